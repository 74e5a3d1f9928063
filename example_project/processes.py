"""Starts processes and always stops them. Each has its own session and is stopped by its id. All waits are bounded."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HASTE = 1.0  # seconds of grace in the final clean-up: no process has state to save
POLL = 0.05  # seconds between two checks of a condition


class Interrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP. Not an `Exception`, so that no `except Exception` catches it before the clean-up."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Ended(Exception):
    """A process ended too early."""


class NotInTime(Exception):
    """A bounded wait ran out."""


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until `condition()` is true. Raises `NotInTime` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise NotInTime(f"not within {seconds:g} s: {what}")
        time.sleep(POLL)


class Processes:
    """Starts processes, and stops all of them on exit."""

    def __init__(self) -> None:
        self._running: dict[subprocess.Popen[str], Path] = {}  # and the log of each
        self._after: list[Callable[[], None]] = []
        self._held = False
        self._signum: int | None = None

    def __enter__(self) -> Processes:
        """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted`, but never before a started process is in `_running`."""
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop_all()
        except Interrupted:  # a signal just before they are ignored
            self.stop_all()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        # Only the first one raises: a second Ctrl-C must not interrupt the clean-up.
        if self._signum is None:
            self._signum = signum
            if not self._held:
                raise Interrupted(signum)

    @contextmanager
    def _hold(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._signum is not None:
                raise Interrupted(self._signum)

    def start(
        self, command: Sequence[str], log: Path, env: dict[str, str], *, talk: bool = False
    ) -> subprocess.Popen[str]:
        """Start one process in its own session, so that Ctrl-C reaches only this one. `talk` gives it pipes."""
        with self._hold(), log.open("ab") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talk else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talk else errors,
                stderr=errors,
                env=env,
                text=True,
                start_new_session=True,
            )
            self._running[process] = log
        return process

    def after(self, action: Callable[[], None]) -> None:
        """Run an action once after all processes have stopped."""
        self._after.append(action)

    def check(self) -> None:
        """Raise `Ended`, with the end of its log, if a process has failed."""
        for process, log in self._running.items():
            if process.poll():  # an agent that is done ends with 0
                raise Ended(f"{log.stem} ended with status {process.returncode}:\n{_tail(log)}")

    def stop(self, processes: Sequence[subprocess.Popen[str]], grace: float) -> None:
        """Send SIGINT to each of them, and after `grace` seconds SIGKILL to what is left of its process group.

        The launcher of the embedded Valkey stops its server only on SIGINT. A Celery worker takes it as a warm
        shutdown.
        """
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL)
        for process in processes:
            # The group and not the leader alone: pool children outlive a worker for a moment.
            _kill_group(process.pid)
            process.wait(timeout=10)  # a killed process ends at once
            for pipe in (process.stdin, process.stdout):
                _close(pipe)
            self._running.pop(process, None)

    def stop_all(self) -> None:
        """Stop all running processes. Signals are ignored from here on."""
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        self.stop(list(self._running), HASTE)
        while self._after:
            self._after.pop()()


def _kill_group(pid: int) -> None:
    # The group may be empty. macOS raises PermissionError for a group of zombies.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    # Enough for a traceback and the lines before it. More would scroll the message off the screen.
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def _close(pipe: IO[str] | None) -> None:
    if pipe is not None:
        with suppress(BrokenPipeError):  # unsent bytes to a dead reader
            pipe.close()
