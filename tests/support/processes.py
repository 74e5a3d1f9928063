"""An operating system process that a test started: its log, its descendants, and how it is ended."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from tests.support import forks
from tests.support.waiting import wait_for

# Seconds that a process gets to end after SIGTERM, before SIGKILL. A warm shutdown of a worker waits for
# its running tasks; those of the tests take a few seconds at most.
GRACE = 15.0


class Program:
    """A started process. It leads its own session, so that Ctrl-C reaches pytest and not the servers."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
        fork: bool = False,
    ) -> None:
        """Starts `command`. Output is appended to `log`. `env` replaces the environment. `user` needs root.

        With `fork`, a command of this Python is started by `forks`, and needs `env` and `cwd`. The system then shows
        the command and environment of the process that forked.
        """
        self.command = [str(part) for part in command]
        self.log = log
        # A restarted server appends to the same file. The log of this start begins here.
        self._log_start = log.stat().st_size if log.exists() else 0
        log.touch()
        self._popen: forks.Fork | subprocess.Popen[bytes]
        if fork and sys.platform == "linux":
            assert self.command[0] == sys.executable
            assert env is not None
            assert cwd is not None
            self._popen = forks.start(self.command[1:], log=log, env=env, cwd=cwd)
        else:
            with log.open("ab") as out:
                self._popen = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=None if env is None else dict(env),
                    cwd=cwd,
                    start_new_session=True,
                    user=user,
                    group=user,
                    extra_groups=[] if user else None,
                )
        _started.add(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; the negative number of the signal that ended it."""
        return self._popen.poll()

    def descendants(self) -> list[psutil.Process]:
        """All processes below this one, and those of its session whose parent has died."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children(recursive=True)
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self.pid and process.pid != self.pid and process not in found:
                    found.append(process)
        return found

    def child_pids(self) -> list[int]:
        """The direct children only, as a sorted list of pids."""
        try:
            return sorted(child.pid for child in psutil.Process(self.pid).children())
        except psutil.NoSuchProcess:
            return []

    def send(self, number: int) -> None:
        """Sends a signal to this process alone."""
        if self.alive:
            os.kill(self.pid, number)

    def pause(self) -> None:
        """Freezes this process and its descendants (SIGSTOP): the parent first, so that it starts no more children."""
        self.send(signal.SIGSTOP)
        for process in self.descendants():
            _signal(process, signal.SIGSTOP)

    def resume(self) -> None:
        """Undoes `pause`."""
        for process in reversed(self.descendants()):
            _signal(process, signal.SIGCONT)
        self.send(signal.SIGCONT)

    def stop(self, timeout: float = GRACE, number: int = signal.SIGTERM) -> None:
        """Sends signal `number`, and SIGKILL after `timeout` seconds. Returns when all its processes have ended."""
        self.resume()  # a frozen process would not see the signal
        family = self.descendants()
        self.send(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)
        self._end(family)

    def kill(self) -> None:
        """Sends SIGKILL to it and its descendants. Returns when all of them have ended."""
        self._end([])

    def _end(self, family: list[psutil.Process]) -> None:
        family = family + [process for process in self.descendants() if process not in family]
        self.send(signal.SIGKILL)
        self._popen.wait()
        for process in family:
            _signal(process, signal.SIGKILL)
        # Orphans are reaped by init, not by this process: wait until each is reaped or a zombie.
        wait_for(lambda: not any(_lives(p) for p in family), GRACE, f"the end of {family}")
        _started.discard(self)

    def outlive(self) -> int:
        """Leaves it running at the end of this process. Returns its pid, so that another process can end it."""
        _started.discard(self)
        return self.pid

    def log_text(self) -> str:
        """The part of the log written since this start."""
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode("utf-8", "replace")

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, with the file's name, for an error message."""
        tail = "\n".join(self.log_text().splitlines()[-lines:])
        return f"--- {self.log} (last {lines} lines)\n{tail}"

    def wait_until_ready(self, ready: Callable[[], bool], timeout: float) -> None:
        """Waits until `ready()` is true. Raises AssertionError at once if the process ends before."""
        wait_for(
            lambda: not self.alive or ready(),
            timeout,
            lambda: f"{Path(self.command[0]).name} to be ready\n{self.log_tail()}",
            every=0.05,
        )
        if not self.alive:
            raise AssertionError(
                f"{' '.join(self.command)} ended with status {self.exit_code} instead of getting ready\n"
                f"{self.log_tail()}"
            )


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, number: int) -> None:
    # psutil compares the start time, so a reused pid is not hit.
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


_started: set[Program] = set()


@atexit.register
def _end_all() -> None:
    """Kills what is left when pytest was cut short. Otherwise fixtures stop what they start, also on failure."""
    for program in list(_started):
        with contextlib.suppress(Exception):
            program.kill()
