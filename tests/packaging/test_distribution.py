"""Wheel and source archive: what they hold, and that they need nothing but what they ask for.

pip uses the index that this machine is set up for.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # downloads of a cold pip cache

PROMISES = {
    "sql": ("celery_idem.stores.sql", "sqlalchemy", "psycopg"),
    "cli": ("celery_idem.cli", "rich"),
    "http": ("celery_idem.adapters.http",),
    "inbox": ("celery_idem.adapters.inbox", "celery_idem.cli", "uvicorn", "rich"),
    "mcp": ("celery_idem.adapters.mcp",),
    "prometheus": ("celery_idem.telemetry.prometheus", "prometheus_client"),
    "otel": ("celery_idem.telemetry.otel", "opentelemetry"),
}
"""What can be imported with one extra alone."""


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """A program's output; its failure is the test's, with everything it said."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it (not from this folder)."""
    pytest.importorskip("build", reason="pip install build twine")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


def environment(folder: Path, requirement: str) -> Path:
    """The interpreter of a new environment with this one requirement installed, and not even pip beside it."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip(python, "install", "--quiet", requirement)
    return python


def pip(python: Path, *words: str) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, *words)


def test_they_hold_what_they_should(built: tuple[Path, Path]) -> None:
    archive, wheel = built
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (metadata,) = (files.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    source = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "celery_idem").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert source == {name for name in names if name.startswith("celery_idem/")}
    assert "License-Expression: MIT" in metadata
    assert {name.partition("/")[0] for name in names} == {"celery_idem", "celery_idem-0.1.0.dist-info"}
    with tarfile.open(archive) as files:
        inside = {name.partition("/")[2] for name in files.getnames()}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "mkdocs.yml"} <= inside
    assert {
        "tests/conftest.py",
        "docs/tutorial.md",
        "example_project/simulate.py",
        "spec/vectors.json",
    } <= inside
    assert not [name for name in inside if ".venv" in name or "__pycache__" in name]


def test_an_index_would_take_them(built: tuple[Path, Path]) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_the_core_alone(built: tuple[Path, Path], tmp_path: Path) -> None:
    python = environment(tmp_path / "env", str(built[1]))
    program = """
import celery_idem
from celery import Celery
app = Celery("shop"); app.conf.idem_store = "memory://"
done = []
@app.task(base=celery_idem.IdempotentTask, name="t", intent=("n",))
def task(n): done.append(n)
task.apply((1,)); task.apply((1,))
assert done == [1], done
from celery_idem.stores import open_store
open_store("redis://localhost:6379/0")  # the driver and the scripts are there; connects to nothing yet
"""
    run(python, "-c", program, cwd=tmp_path)
    installed = pip(python, "list", "--format=freeze").lower()
    for foreign in (
        "sqlalchemy",
        "rich=",
        "starlette",
        "mcp=",
        "prometheus",
        "opentelemetry",
        "django",
        "pydantic",
    ):
        assert foreign not in installed
    # A missing extra is a message, not a stack: it names the extra.
    for url, extra in (("sqlite:///x.db", "sql"), ("postgresql://u@h/d", "sql")):
        said = run(
            python,
            "-c",
            f"""
from celery_idem import ConfigurationError
from celery_idem.stores import open_store
try: open_store({url!r})
except ConfigurationError as error: print(error)
""",
            cwd=tmp_path,
        )
        assert f"pip install 'celery_idem[{extra}]'" in said


@pytest.mark.parametrize("extra", PROMISES)
def test_an_extra_alone(built: tuple[Path, Path], extra: str, tmp_path: Path) -> None:
    """What the wheel asks for is enough: everything else that is installed here cannot be imported."""
    run(sys.executable, "-m", "zipfile", "-e", built[1], tmp_path)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    asked = message_from_string(metadata.read_text()).get_all("Requires-Dist") or []
    wanted = closure(asked, {extra})
    foreign = {
        top for top, owners in packages_distributions().items() if not wanted & {*map(canonical, owners)}
    }
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {foreign - {"celery_idem"}!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import {", ".join(PROMISES[extra])}
import celery_idem
print(celery_idem.__file__)
"""
    assert run(sys.executable, "-c", program, cwd=tmp_path).startswith(str(tmp_path))


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def closure(requirements: list[str], extras: set[str]) -> set[str]:
    """The distributions that these requirements bring, of a project with these extras."""
    found: set[str] = set()
    left = [(requirement, frozenset(extras | {""})) for requirement in requirements]
    seen = set(left)
    while left:
        text, of = left.pop()
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in of):
            continue
        found.add(canonical(requirement.name))
        with contextlib.suppress(PackageNotFoundError):  # one for another platform
            more = {
                (line, frozenset(requirement.extras | {""})) for line in requires(requirement.name) or ()
            } - seen
            seen |= more
            left += more
    return found
