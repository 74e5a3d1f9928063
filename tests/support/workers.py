"""A real Celery worker in a separate process."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.support.processes import GRACE, Program

ROOT = Path(__file__).resolve().parents[2]

# Seconds until the worker says it is ready: about 2 alone, more when the machine is busy.
READY_WITHIN = 60.0

_numbers = itertools.count(1)


class CeleryWorker:
    """`python -m celery -A app worker …`, started and ready when the constructor returns.

    `app` is the argument of `-A` ("tests.apps.billing" or "module:app"). The repository and `folder` are on the
    worker's path. `env` is added to this process' environment. `options` are further words of the command
    line, such as ("--max-tasks-per-child", "1"). The log is `folder/NAME.log`; its level must be INFO or lower.
    """

    def __init__(
        self,
        app: str,
        folder: Path,
        *,
        pool: str = "prefork",
        concurrency: int = 1,
        env: Mapping[str, str] | None = None,
        options: tuple[str, ...] = (),
        name: str | None = None,
        loglevel: str = "INFO",
    ) -> None:
        # The processes of a run share one RabbitMQ, where a worker's own queue is named after the worker.
        self.name = name or f"worker{next(_numbers)}{os.environ.get('PYTEST_XDIST_WORKER', '')}"
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "celery",
            "-A",
            app,
            "worker",
            "--pool",
            pool,
            "--loglevel",
            loglevel,
        ]
        command += ["--concurrency", str(concurrency), "--hostname", f"{self.name}@localhost"]
        # The workers of a test need not know each other, and searching for others costs a second at the start.
        command += ["--without-gossip", "--without-mingle", *options]
        path = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.program = Program(
            command,
            log=folder / f"{self.name}.log",
            env=environment,
            cwd=folder,
            fork=pool not in ("gevent", "eventlet"),  # these must patch before anything is imported
        )
        try:
            self.program.wait_until_ready(lambda: " ready." in self.log_text(), READY_WITHIN)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        return self.program.pid

    @property
    def alive(self) -> bool:
        return self.program.alive

    @property
    def exit_code(self) -> int | None:
        return self.program.exit_code

    def child_pids(self) -> list[int]:
        """The pids of a prefork pool. Empty for other pools."""
        return self.program.child_pids()

    def kill_child(self, pid: int | None = None) -> int:
        """Sends SIGKILL to one process of the pool, as the kernel does when memory runs out, and returns its pid.

        Without `pid` the pool must have just one process. An effect contains the pid of the process that did it.
        """
        children = self.child_pids()
        if pid is None:
            assert len(children) == 1, f"give one of {children}\n{self.log_tail()}"
            pid = children[0]
        assert pid in children, f"{pid} is not among {children}\n{self.log_tail()}"
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self, timeout: float = GRACE) -> None:
        """Warm shutdown (SIGTERM): running tasks end first. Sends SIGKILL after `timeout` seconds."""
        self.program.stop(timeout)

    def cold_stop(self, timeout: float = GRACE) -> None:
        """Cold shutdown (SIGQUIT): running tasks are dropped."""
        self.program.stop(timeout, signal.SIGQUIT)

    def kill(self) -> None:
        """Sends SIGKILL to the worker and its pool."""
        self.program.kill()

    def pause(self) -> None:
        """Freezes the worker and its pool."""
        self.program.pause()

    def resume(self) -> None:
        self.program.resume()

    def sent_back(self, task_id: str) -> bool:
        """Whether a delivery of this message waits outside of the worker."""
        lines = self.log_text().splitlines()
        return any(
            f"task_id={task_id}" in line and re.search(r" (waiting|store_error) ", line) for line in lines
        )

    def log_text(self) -> str:
        return self.program.log_text()

    def log_tail(self, lines: int = 60) -> str:
        return self.program.log_tail(lines)

    def __enter__(self) -> CeleryWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{self.name}, pid {self.pid}, {'up' if self.alive else 'down'}>"
