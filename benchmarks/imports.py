"""Measures what ``import celery_idem`` adds to ``import celery``: ``python -m benchmarks.imports``.

It compares the CPU time of whole interpreters, in turn. Celery imports lazily, so the base is
``Celery`` and ``Task``, which every worker and producer imports anyway.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys

from benchmarks.report import Row, compared, show

BASE = "from celery import Celery, Task; Celery; Task"

TARGET = 1.15
"""Target: the CPU time with celery_idem over that without it."""


def cpu_of(code: str) -> float:
    """Return the CPU seconds of an interpreter that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Compiling must not count, so the bytecode is always written.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(rounds: int = 15) -> list[Row]:
    """Return milliseconds. The first round fills the caches and does not count."""
    code = {"import celery": BASE, "celery_idem, with celery": f"{BASE}; import celery_idem"}
    found: dict[str, list[float]] = {name: [] for name in code}
    for turn in range(rounds + 1):
        for name, text in code.items():
            taken = cpu_of(text) * 1e3
            if turn:
                found[name].append(taken)
    return compared("Import: CPU", found, "import celery", "ms", {"celery_idem, with celery": TARGET})


if __name__ == "__main__":
    show(rows())
