"""Counts the instructions that a task costs its process: ``python -m benchmarks.instructions``.

``valgrind --tool=callgrind`` counts them, so other load does not matter, and the same Python gives the same
count to a fraction of a percent. The count covers what a pool's process does for a message: Celery's tracer
decodes it, calls the task, and writes the result to a real Redis. It does not cover the worker's main loop,
which receives and acknowledges messages.

Everything is imported once. Then a child is forked for each variant and number of tasks. The difference
between two numbers of tasks is the cost of tasks alone, without the start and the first call.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Row, show
from celery_idem.core.model import MESSAGE
from celery_idem.engine import lease
from celery_idem.integration.messages import BODY, ENCODING
from tests.support.servers import RedisServer

FEW, MANY = 20, 100
"""Tasks of the two runs. The difference of eighty is enough: counts differ by a few parts in a thousand."""

IMPORTED = (
    "celery.app.trace",
    "celery.backends.redis",
    "kombu.transport.redis",
    "redis.connection",
    "celery_idem.integration.delivery",
    "celery_idem.stores.redis",
)
"""Modules for every child, imported once because importing takes most of the time."""

VARIANTS = ("bare", "floor", "idem", "apart")

PATIENCE = 1200
"""Timeout in seconds. Under valgrind Python is fifty times as slow: half a minute on an idle machine, and
ten on one that is busy with twenty other processes."""


class ValgrindMissingError(Exception):
    """valgrind is not installed, or cannot run here."""


def valgrind() -> str:
    """Return the path of valgrind.

    Raises:
        ValgrindMissingError: the text says what to install.
    """
    found = shutil.which("valgrind")
    if found is None:
        raise ValgrindMissingError("valgrind is not installed: apt-get install valgrind")
    return found


def counted(command: list[str], folder: Path) -> None:
    """Run a command. Each of its processes writes its count into ``folder``."""
    ran = subprocess.run(
        [valgrind(), "--tool=callgrind", f"--callgrind-out-file={folder}/%p", "-q", *command],
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:]


def instructions(file: Path) -> int:
    """Return the count of one process from callgrind's file."""
    found = re.search(r"^(?:summary|totals): (\d+)", file.read_text(), re.MULTILINE)
    assert found, f"{file} has no count"
    return int(found[1])


# --- under valgrind ----------------------------------------------------------------------


def messages(noop: Any, number: int) -> list[tuple[str, dict[str, Any], bytes]]:
    """Return messages as a worker hands them to its pool: id, request and body.

    All arguments have the same number of digits. They depend on the pid, so that no two runs share an intent.
    """
    app = noop.app
    first = 10_000_000 + 1_000 * (os.getpid() % 10_000)
    made = []
    for n in range(first, first + number):
        options: dict[str, Any] = {}
        task_id = str(uuid.UUID(int=n))
        if hasattr(noop, "_with_key"):
            options = noop._with_key((n,), {}, {}, {}, task_id)
            options["headers"][MESSAGE] = task_id
        message = app.amqp.as_task_v2(task_id, noop.name, (n,), {})
        request = {
            **message.headers,
            **options.get("headers", {}),
            "headers": options.get("headers", {}),
            "hostname": "bench",
            "is_eager": False,
            "reply_to": "",
            "correlation_id": task_id,
            "delivery_info": {"exchange": "", "routing_key": "bench", "priority": 0, "redelivered": False},
        }
        text = app.backend.encode(message.body)
        body = text.encode() if isinstance(text, str) else text
        # The request class of a guarded task adds the body here. Celery's own class does not.
        properties = {"correlation_id": task_id, "reply_to": "", "delivery_mode": 2, "priority": 0}
        if hasattr(noop, "_with_key"):
            properties |= {"content_type": "application/json", BODY: body, ENCODING: "utf-8"}
        made.append((task_id, {**request, "properties": properties}, body))
    return made


def work(variant: str, tasks: int, url: str) -> None:
    """Run messages through Celery's tracer, in a forked child."""
    # "idem", the default: the result backend is the store. Otherwise Celery writes the result itself.
    store = f"{url}/1" if variant == "idem" else f"{url}/2"
    os.environ.update(
        BENCH_VARIANT=variant, BENCH_URL=f"{url}/0", BENCH_RESULTS=f"{url}/1", BENCH_STORE=store
    )
    from celery.app.trace import setup_worker_optimizations, trace_task_ret

    from benchmarks.apps import app, noop

    # The renewing thread works by the clock, and on a busy machine a task takes a second under valgrind.
    lease.SHORTEST_SLEEP = lease.LONGEST_SLEEP = 3600.0
    app.finalize()
    app.set_current()
    setup_worker_optimizations(app, "bench")
    for task_id, request, body in messages(noop, MANY)[:tasks]:
        failed, result, _ = trace_task_ret(noop.name, task_id, request, body, "application/json", "utf-8")
        assert not failed, result


def children(variants: Sequence[str], url: str, numbers: Path) -> None:
    """Fork one child after the other, and write which process ran which variant."""
    for name in IMPORTED:
        importlib.import_module(name)

    gc.freeze()  # otherwise the number of garbage collections varies
    lines = []
    for variant in variants:
        for tasks in (FEW, MANY):
            pid = os.fork()
            if pid == 0:
                try:
                    work(variant, tasks, url)
                    status = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                    status = 1
                sys.stdout.flush()
                os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0, f"{variant} failed"
            lines.append(f"{variant} {tasks} {pid}\n")
    numbers.write_text("".join(lines))


# --- the parent --------------------------------------------------------------------------


def per_task(variants: Sequence[str] = VARIANTS) -> dict[str, float]:
    """Return the instructions per task of each variant (see ``benchmarks.apps``).

    Raises:
        ValgrindMissingError: no valgrind.
        ServerMissingError: no Redis.
    """
    valgrind()
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder) / "redis") as server:
        counts = Path(folder) / "counts"
        counts.mkdir()
        numbers = Path(folder) / "numbers"
        base = server.url.rsplit("/", 1)[0]
        words = ["-m", "benchmarks.instructions", "--children", ",".join(variants), base, str(numbers)]
        counted([sys.executable, *words], counts)
        found: dict[str, dict[int, int]] = {}
        for line in numbers.read_text().splitlines():
            variant, tasks, pid = line.split()
            found.setdefault(variant, {})[int(tasks)] = instructions(counts / pid)
    return {variant: (runs[MANY] - runs[FEW]) / (MANY - FEW) for variant, runs in found.items()}


def rows() -> list[Row]:
    """Return the rows, or one row that says why there are none."""
    group = "Instructions of a pool's process per no-op task"
    try:
        found = per_task()
    except ValgrindMissingError as error:
        return [Row(group, "celery_idem", note=str(error))]
    return compared_to_bare(group, found)


def compared_to_bare(group: str, found: Mapping[str, float]) -> list[Row]:
    """Return a row for each variant's instructions per task, with the ratio to bare Celery's."""
    names = {
        "bare": "bare Celery",
        "floor": "floor: SET NX GET, SET",
        "idem": "celery_idem",
        "apart": "celery_idem, store elsewhere",
    }
    return [
        Row(group, names[variant], round(number / found["bare"], 3), value=f"{number / 1e3:,.0f} thousand")
        for variant, number in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--children", nargs=3, metavar=("VARIANTS", "URL", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.children:
        variants, url, numbers = options.children
        children(variants.split(","), url, Path(numbers))
    else:
        show(rows())


if __name__ == "__main__":
    main()
