"""Installs other guards for Celery in their own environment, ``build/bench-env``.

All variants run from that environment, so that Python, Celery and redis-py are the same.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "bench-env"

PACKAGES = ("celery-once", "celery-singleton", "idemkit", "fencekit", "relier")
"""Their names on PyPI and in ``benchmarks.apps``."""

TRY = "import os; os.environ['BENCH_VARIANT'] = {!r}; import benchmarks.apps"

INSTALL_WITHIN = 600
"""Seconds to install one package."""


def environment() -> tuple[str, dict[str, str]]:
    """Return the interpreter, and for each peer why it cannot be measured ("" if it can).

    The first call creates the environment. If nothing can be installed, it is this interpreter without peers.
    """
    python = str(PLACE / "bin" / "python")
    stamp = PLACE / ".ready"
    wanted = " ".join((*PACKAGES, *_pinned()))
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(PACKAGES)} into {PLACE.relative_to(ROOT)} …", flush=True)
        shutil.rmtree(PLACE, ignore_errors=True)
        why = _made(python)
        if why:
            print(f"the peers are left out: {why}", flush=True)
            return sys.executable, dict.fromkeys(PACKAGES, why)
        stamp.write_text(wanted)
    return python, {name: _imported(python, name) for name in PACKAGES}


def _pinned() -> list[str]:
    """Return the versions to install. redis-py uses hiredis if it is installed, so it must agree."""
    names = ["celery", "kombu", "redis", *(["hiredis"] if find_spec("hiredis") else [])]
    return [f"{name}=={version(name)}" for name in names]


def _made(python: str) -> str:
    """Create the environment; return "" or the error. ``_imported`` leaves out peers that fail alone."""
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(PLACE)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        return f"no environment: {_last(made)}"
    base = _pip(python, "--editable", str(ROOT), "psutil", *_pinned())
    if base:
        return f"nothing can be installed here: {base}"
    for name in PACKAGES:
        why = _pip(python, name, *_pinned())
        if why:
            print(f"{name} cannot be installed: {why}", flush=True)
    return ""


def _pip(python: str, *words: str) -> str:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_WITHIN)
    return _last(ran) if ran.returncode else ""


def _imported(python: str, name: str) -> str:
    ran = subprocess.run(
        [python, "-c", TRY.format(name)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=INSTALL_WITHIN,
    )
    return f"cannot run here: {_last(ran)}" if ran.returncode else ""


def _last(ran: subprocess.CompletedProcess[str]) -> str:
    """Return the line with the error."""
    errors = [line for line in ran.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return errors[-1].strip() if errors else f"exit status {ran.returncode}"
