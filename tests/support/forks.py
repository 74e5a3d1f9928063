"""Starts Python programs as forks of one process that has imported Celery: imports are most of the CPU of a start.

`start(["-m", "celery", …], log=…, env=…, cwd=…)` replaces `subprocess.Popen([sys.executable, "-m", "celery", …])`. The
program runs in a new session, with that environment and folder. It imports all modules itself, except `IMPORTED`.
These contain nothing of this package, because each worker's main process has to make its own owner prefix.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.waiting import wait_for

IMPORTED = (
    *("celery.app.builtins", "celery.app.events", "celery.app.log", "celery.apps.beat", "celery.apps.worker"),
    *("celery.backends.redis", "celery.bin.amqp", "celery.bin.beat", "celery.bin.call", "celery.bin.control"),
    *("celery.bin.events", "celery.bin.graph", "celery.bin.list", "celery.bin.logtool", "celery.bin.migrate"),
    *("celery.bin.multi", "celery.bin.purge", "celery.bin.result", "celery.bin.shell", "celery.bin.upgrade"),
    *(
        "celery.bin.worker",
        "celery.concurrency.prefork",
        "celery.concurrency.solo",
        "celery.concurrency.thread",
    ),
    *("celery.fixups.django", "celery.loaders.app", "celery.worker.autoscale", "celery.worker.components"),
    *("celery.worker.consumer", "celery.worker.pidbox", "celery.worker.strategy", "kombu.transport.memory"),
    *("kombu.transport.pyamqp", "kombu.transport.redis", "psutil", "pydantic", "redis.asyncio", "rfc8785"),
)

ADDRESS = "CELERY_IDEM_TESTS_FORKS"
"""Environment variable: the socket of the process that forks. Started programs use the same process."""

NUMBER = struct.Struct("!i")
"""The format of both answers: the program's pid, and later its exit status, as `subprocess` gives it."""

_starting = threading.Lock()
_pipes: list[Any] = []  # keeps stdin of the forking process open: it ends when its starter does


class Fork:
    """A started program, with the part of the interface of `subprocess.Popen` that is used here."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            said = self._connection.recv(NUMBER.size, socket.MSG_WAITALL)
            # No answer: the process that forks has ended, so the status is not known.
            self.returncode = NUMBER.unpack(said)[0] if said else -signal.SIGKILL
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        try:
            wait_for(lambda: self.poll() is not None, 3600.0 if timeout is None else timeout)
        except AssertionError:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0) from None
        assert self.returncode is not None
        return self.returncode


def start(
    words: Sequence[str], *, log: Path, errors: Path | None = None, env: Mapping[str, str], cwd: Path
) -> Fork:
    """Runs `python` with these words, of which the first is `-m` or a file.

    Its output is appended to `log`. Its stderr is appended to `errors` if that is given.
    """
    order = {
        "words": list(words),
        "out": [str(log), str(errors or log)],
        "env": dict(env),
        "cwd": str(cwd),
    }
    connection = _connected()
    connection.sendall(json.dumps(order).encode() + b"\n")
    return Fork(connection, NUMBER.unpack(connection.recv(NUMBER.size, socket.MSG_WAITALL))[0])


def _connected() -> socket.socket:
    with _starting:
        with contextlib.suppress(KeyError, OSError):
            return _connect(os.environ[ADDRESS])
        address = f"{tempfile.mkdtemp(prefix='celery-idem-forks-')}/socket"
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.forks", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline(), "the process that forks did not start"
        _pipes.append(process)
        os.environ[ADDRESS] = address
        return _connect(address)


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


# -- the process that forks ------------------------------------------------------------------------------
def serve(address: str) -> dict[str, Any]:
    """Forks for each order. Returns only in a fork, with its order; never in this process itself."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # not in this version of Celery
            importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wake, waken = socket.socketpair()
    waken.setblocking(False)
    signal.set_wakeup_fd(waken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    gc.freeze()  # the forks share this memory
    os.write(1, b"ready\n")
    while True:
        ready, _, _ = select.select([0, wake, listener], [], [])
        if wake in ready:
            wake.recv(4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    with running.pop(ended[0]) as asked, contextlib.suppress(OSError):
                        asked.sendall(NUMBER.pack(os.waitstatus_to_exitcode(ended[1])))
        if 0 in ready and not os.read(0, 1):
            Path(address).unlink()
            Path(address).parent.rmdir()
            os._exit(0)
        if listener in ready:
            asked, _ = listener.accept()
            with asked.makefile("rb") as lines:
                order = lines.readline()
            if not order:
                asked.close()
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for one in (listener, wake, waken, asked, *running.values()):
                    one.close()
                return dict(json.loads(order))
            running[pid] = asked
            with contextlib.suppress(OSError):
                asked.sendall(NUMBER.pack(pid))


def become(order: Mapping[str, Any]) -> None:
    """Sets up session, files, folder, environment and modules as for a new program, and runs it."""
    os.setsid()
    files = [os.open(os.devnull, os.O_RDONLY)]
    files += [os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) for name in order["out"]]
    for place, file in enumerate(files):
        os.dup2(file, place)
        os.close(file)
    os.chdir(order["cwd"])
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(order["env"])
    time.tzset()
    sys.argv = list(order["words"])
    is_module = sys.argv[0] == "-m"
    if is_module:
        del sys.argv[0]
    what = sys.argv[0]
    here = order["cwd"] if is_module else str(Path(what).resolve().parent)
    given = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [here, *given, *(place for place in sys.path[1:] if place not in before)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    importlib.invalidate_caches()
    if is_module:
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    become(serve(sys.argv[1]))
