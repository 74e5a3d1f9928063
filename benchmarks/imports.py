"""Measures what ``import celery_idem`` adds to ``import celery``: ``python -m benchmarks.imports``.

It compares the CPU time of whole interpreters, in turn. Celery imports lazily, so the base is
``Celery`` and ``Task``, which every worker and producer imports anyway.

With valgrind it also counts the instructions, which other load does not change: of the import, and of
the import with one declared task. A program pays the second.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.instructions import ValgrindMissingError, counted, instructions
from benchmarks.report import Row, compared, show

BASE = "from celery import Celery, Task; Celery; Task"

TARGET = 1.15
"""Target: the CPU time with celery_idem over that without it."""

IMPORT = f"{BASE}; import celery_idem"

DECLARED = """
from celery import Celery, Task
{more}
app = Celery("shop")
@app.task({options})
def ship(order):
    pass
app.finalize()
"""

PLAIN_TASK = DECLARED.format(more="", options="")
GUARDED_TASK = DECLARED.format(
    more="from celery_idem import IdempotentTask", options="base=IdempotentTask, intent=('order',)"
)


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
    code = {"import celery": BASE, "celery_idem, with celery": IMPORT}
    found: dict[str, list[float]] = {name: [] for name in code}
    for turn in range(rounds + 1):
        for name, text in code.items():
            taken = cpu_of(text) * 1e3
            if turn:
                found[name].append(taken)
    timed = compared("Import: CPU", found, "import celery", "ms", {"celery_idem, with celery": TARGET})
    return timed + counted_rows()


def instructions_of(code: str) -> int:
    """Return the instructions of an interpreter that runs ``code``.

    Raises:
        ValgrindMissingError: no valgrind.
    """
    cpu_of(code)  # writes the bytecode
    with tempfile.TemporaryDirectory() as folder:
        counted([sys.executable, "-c", code], Path(folder))
        return sum(map(instructions, Path(folder).iterdir()))


def counted_rows() -> list[Row]:
    """Return the rows of instructions, or one row that says why there are none."""
    group = "Import: instructions"
    made = []
    try:
        for base, more in (("import celery", IMPORT), ("a declared task", GUARDED_TASK)):
            without = instructions_of(BASE if more is IMPORT else PLAIN_TASK)
            ratio = instructions_of(more) / without
            made += [
                Row(group, base, 1.0, value=f"{without / 1e6:,.0f} million"),
                Row(
                    group,
                    f"{base}, with celery_idem",
                    round(ratio, 3),
                    value=f"{ratio * without / 1e6:,.0f} million",
                ),
            ]
    except ValgrindMissingError as error:
        return [Row(group, "celery_idem", note=str(error))]
    return made


if __name__ == "__main__":
    show(rows())
