"""Wheel and source archive: their files, and that the wheel works with only its declared requirements.

pip uses the index that is configured on this machine.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from email import message_from_string
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # downloads, if pip's cache is empty

PROMISES = {
    "sql": ("celery_idem.stores.sql", "sqlalchemy", "psycopg"),
    "cli": ("celery_idem.cli", "rich"),
    "http": ("celery_idem.adapters.http",),
    "inbox": ("celery_idem.adapters.inbox", "celery_idem.cli", "uvicorn", "rich"),
    "mcp": ("celery_idem.adapters.mcp",),
    "prometheus": ("celery_idem.telemetry.prometheus", "prometheus_client"),
    "otel": ("celery_idem.telemetry.otel", "opentelemetry"),
    "agents": ("celery_idem.adapters.agents", "pydantic"),
    "seal": ("celery_idem.core.sealing", "cryptography.hazmat.primitives.ciphers.aead"),
}
"""The modules that can be imported with one extra alone."""

DEVELOPERS = {"demo", "test", "docs", "dev"}
"""Extras that no application needs."""


def run(*words: str | Path, cwd: Path | None = None) -> str:
    """Run a program and return its output. If it fails, the test fails and shows the whole output."""
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
    """The source archive, and the wheel that is built from the archive."""
    pytest.importorskip("build", reason="pip install build twine")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def unpacked(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, as pip installs them."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built[1]) as files:
        files.extractall(folder)  # noqa: S202  # the wheel is ours
    return folder


@pytest.fixture(scope="module")
def asked(unpacked: Path) -> list[str]:
    """The wheel's requirements."""
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    return message_from_string(metadata.read_text()).get_all("Requires-Dist") or []


@pytest.fixture(scope="module")
def installed() -> Mapping[str, list[str]]:
    """The installed distributions by the modules that they provide."""
    return packages_distributions()


def run_with(folder: Path, distributions: set[str], installed: Mapping[str, list[str]], program: str) -> str:
    """Run a program on the wheel's files. Of the installed distributions only these can be imported."""
    foreign = {top for top, owners in installed.items() if not distributions & {*map(canonical, owners)}}
    absent = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {foreign - {"celery_idem"}!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import celery_idem
assert celery_idem.__file__.startswith({str(folder)!r}), celery_idem.__file__
"""
    return run(sys.executable, "-c", absent + program, cwd=folder)


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


def test_the_core_alone(unpacked: Path, asked: list[str], installed: Mapping[str, list[str]]) -> None:
    program = """
from celery import Celery
app = Celery("shop"); app.conf.idem_store = "memory://"
done = []
@app.task(base=celery_idem.IdempotentTask, name="t", intent=("n",))
def task(n): done.append(n)
task.apply((1,)); task.apply((1,))
assert done == [1], done
from celery_idem.stores import open_store
open_store("redis://localhost:6379/0")  # the driver and the scripts are there; connects to nothing yet
for url in ("sqlite:///x.db", "postgresql://u@h/d"):
    try: open_store(url)
    except celery_idem.ConfigurationError as error: print(error)
"""
    wanted = closure(asked, set())
    said = run_with(unpacked, wanted, installed, program)
    # The message about a missing extra names the extra.
    assert said.count("pip install 'celery_idem[sql]'") == 2
    foreign = {"sqlalchemy", "rich", "starlette", "mcp", "prometheus-client", "django", "pydantic"}
    assert wanted & {*foreign, "opentelemetry-api"} == set()


def test_every_extra_is_promised(asked: list[str]) -> None:
    extras = {word for line in asked for word in re.findall(r"extra == ['\"](\w+)['\"]", line)}
    assert extras - DEVELOPERS == PROMISES.keys()


@pytest.mark.parametrize("extra", PROMISES)
def test_an_extra_alone(
    unpacked: Path, asked: list[str], installed: Mapping[str, list[str]], extra: str
) -> None:
    """The wheel's requirements with one extra are enough: no other installed distribution can be imported."""
    run_with(unpacked, closure(asked, {extra}), installed, f"import {', '.join(PROMISES[extra])}")


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def closure(requirements: list[str], extras: set[str]) -> set[str]:
    """Return the distributions that pip would install for these requirements with these extras."""
    found: set[str] = set()
    left = [(requirement, frozenset(extras | {""})) for requirement in requirements]
    seen = set(left)
    while left:
        text, of = left.pop()
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in of):
            continue
        found.add(canonical(requirement.name))
        with contextlib.suppress(PackageNotFoundError):  # a requirement of another platform
            more = {
                (line, frozenset(requirement.extras | {""})) for line in requires(requirement.name) or ()
            } - seen
            seen |= more
            left += more
    return found
