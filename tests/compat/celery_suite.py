"""Runs Celery's own unit tests with and without our task class: `make celery-suite`.

A task without an intent must behave as an ordinary Celery task. Celery's own tests describe that behaviour best. They
run unchanged, twice: once as they are, and once with `task_cls=IdempotentTask` as the default of every application
(`guarded.py`). The same tests must fail in both runs. Some fail in any environment, and more of them as root.

The script downloads Celery's source archive and installs what those tests need into a separate environment in
`build/celery-suite`. It needs the network and about ten minutes. `make test` does not run it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import celery

ROOT = Path(__file__).resolve().parents[2]

DJANGOS = (
    "expects Celery's Django task class. Celery replaces only its own default with it and keeps any other task "
    "class. Projects that need both use celery_idem.adapters.django:IdempotentDjangoTask"
)

EXPECTED = {
    "t.unit.fixups.test_django.test_DjangoFixup::test_install": DJANGOS,
    "t.unit.fixups.test_django.test_DjangoFixup::test_install_subclassed_app_without_custom_task_cls": DJANGOS,
}
"""Tests that may fail with our class only, each with the reason."""

NEEDLESS = ("mypy", "pre-commit")
"""Packages in the requirements of Celery's tests that the tests do not need."""

ALIKE = "2"
"""Number of processes. With more than two, Celery's tests of timers sometimes fail."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.compat.celery_suite", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--celery", default=celery.__version__, help="version of Celery; the default is the installed one"
    )
    parser.add_argument(
        "tests", nargs="*", default=["t/unit"], help="what to run, below t/unit; the default is all"
    )
    asked = parser.parse_args(words)
    folder = ROOT / "build" / "celery-suite" / asked.celery
    source, python = prepared(folder, asked.celery)
    without = failures(source, python, folder / "without", asked.tests)
    guarded = failures(source, python, folder / "with", asked.tests, ours=True)
    differing = {name for name in without ^ guarded if name not in EXPECTED}
    if differing:  # this may be chance, so their files run once more, in one process
        files = sorted({file_of(name, source) for name in differing})
        print(f"{len(differing)} tests differ: once more, {' '.join(files)}", flush=True)
        again = failures(source, python, folder / "without-again", files, processes="0")
        differing &= again ^ failures(source, python, folder / "with-again", files, ours=True, processes="0")
    print(f"Celery {asked.celery}: {len(without)} fail without our class, {len(guarded)} with it")
    for name in sorted(differing):
        print(f"  only {'with' if name in guarded else 'without'} it: {name}")
    print(f"{len(differing)} differences that are not expected; outputs are in {folder.relative_to(ROOT)}")
    return 1 if differing else 0


def prepared(folder: Path, version: str) -> tuple[Path, Path]:
    """Return a folder with Celery's tests and without its source, and an interpreter with this Celery installed."""
    source, python = folder / f"celery-{version}", folder / "venv" / "bin" / "python"
    ready = folder / "ready"
    if ready.exists():
        return source, python
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"fetching Celery {version} and what its tests need …", flush=True)
    venv.create(folder / "venv", with_pip=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # `--no-binary :all:` would also build all packages that are needed to build Celery.
    fetch = ["download", "--no-deps", "--no-binary", "celery", f"celery=={version}", "--dest", str(folder)]
    subprocess.run([*pip, *fetch], check=True)
    with tarfile.open(folder / f"celery-{version}.tar.gz") as archive:
        archive.extractall(folder)  # noqa: S202  # from the registry that Celery itself is installed from
    shutil.rmtree(source / "celery")  # the installed Celery is tested
    needed = source / "requirements" / "needed.txt"  # in this folder, because the files include each other
    lines = (source / "requirements" / "test.txt").read_text().splitlines()
    needed.write_text("\n".join(line for line in lines if not line.startswith(NEEDLESS)))
    own = [f"celery[redis]=={version}", "redis>=5,!=5.3.*", "rfc8785", "pytest-xdist"]
    subprocess.run([*pip, "install", "-r", str(needed), *own], check=True)
    ready.touch()
    return source, python


def failures(
    source: Path, python: Path, out: Path, tests: Sequence[str], *, ours: bool = False, processes: str = ALIKE
) -> set[str]:
    """Run the tests and return the names of those that failed or had an error."""
    words = ["-m", "pytest", "-q", "-n", processes, "--dist", "loadfile", "-p", "no:cacheprovider", *tests]
    if ours:
        words += ["-p", "tests.compat.guarded"]
    report = out.with_suffix(".xml")
    report.unlink(missing_ok=True)
    with out.with_suffix(".log").open("wb") as log:
        done = subprocess.run(
            [python, *words, f"--junitxml={report}"],
            cwd=source,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if done.returncode not in (0, 1) or not report.exists():  # 1 means that tests failed
        raise SystemExit(f"pytest ended with {done.returncode}: see {log.name}")
    cases = list(ET.parse(report).iter("testcase"))  # noqa: S314  # pytest wrote the file
    failed = {
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    }
    print(f"{out.name}: {len(cases)} tests, {len(failed)} fail", flush=True)
    return failed


def file_of(name: str, source: Path) -> str:
    """Return the file of a test: `t.unit.app.test_app.test_App::test_x` is in t/unit/app/test_app.py."""
    parts = name.split("::", maxsplit=1)[0].split(".")
    while parts and not (source / Path(*parts)).with_suffix(".py").is_file():
        parts.pop()
    return str(Path(*parts).with_suffix(".py"))


if __name__ == "__main__":
    sys.exit(main())
