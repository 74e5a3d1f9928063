"""What ``import celery_idem`` adds to ``import celery``: ``python -m benchmarks.imports``.

CPU time of whole interpreters, in turn. Celery itself is lazy, so the fair base is what
every worker and producer imports anyway: ``Celery`` and ``Task``.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

BASE = "from celery import Celery, Task; Celery; Task"


def cpu_of(code: str) -> float:
    """CPU seconds of one interpreter that runs ``code``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Compiling is not importing: the bytecode must be there, whatever the caller's environment says.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    ratios = []
    for turn in range(11):
        bare, ours = cpu_of(BASE), cpu_of(f"{BASE}; import celery_idem")
        if turn:  # the first round fills the caches
            ratios.append(ours / bare)
    print(f"import: {statistics.median(ratios):.2f} × import celery   (median of 10 rounds)")


if __name__ == "__main__":
    main()
