"""Other guards for Celery, in an environment of their own: ``build/bench-env``.

They are measured with the same Python, Celery and redis-py as everything beside them, so bare
Celery, the floor and ``celery_idem`` run from that environment too.
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
"""As they are called on PyPI, and in ``benchmarks.apps``."""

TRY = "import os; os.environ['BENCH_VARIANT'] = {!r}; import benchmarks.apps"

INSTALL_WITHIN = 600
"""Seconds for one package and what it needs."""


def environment() -> tuple[str, dict[str, str]]:
    """The interpreter to measure with, and for each peer why it cannot be measured ("" where it can).

    Made at the first call. Where nothing can be installed, it is this very interpreter, and no peer.
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
    """What must be the same as here. hiredis where it is here: redis-py takes it when it finds it."""
    names = ["celery", "kombu", "redis", *(["hiredis"] if find_spec("hiredis") else [])]
    return [f"{name}=={version(name)}" for name in names]


def _made(python: str) -> str:
    """Build it. "" or why not. A peer that cannot be installed alone is left out by ``_imported``."""
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
    """The line that says what went wrong."""
    errors = [line for line in ran.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return errors[-1].strip() if errors else f"exit status {ran.returncode}"
