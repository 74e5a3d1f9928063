"""One RabbitMQ for all test processes of a run: the first that needs it starts it, pytest-xdist's controller ends it.

Its start takes more of the machine than any other server's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from pathlib import Path

import psutil

from tests.support.servers import RabbitMQServer

RUNNING = "running.json"
"""Its port, and the id and start time of each process: an id may be another's by now."""


def rabbitmq(folder: Path) -> RabbitMQServer:
    """The server of this folder, which is running. No test may end or freeze it.

    Raises:
        ServerMissingError: it is not installed.
    """
    folder.mkdir(exist_ok=True)
    server = RabbitMQServer(folder)
    running = folder / RUNNING
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be starting it
        if running.exists():
            server.port = json.loads(running.read_text())["port"]
        else:
            server.start()
            pids = server.share()
            begun = [[pid, psutil.Process(pid).create_time()] for pid in pids]
            running.write_text(json.dumps({"port": server.port, "pids": begun}))
    return server


def end(folder: Path) -> None:
    """End the server of this folder, if one was started."""
    running = folder / RUNNING
    if not running.exists():
        return
    for pid, begun in json.loads(running.read_text())["pids"]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.create_time() == begun:
                for child in process.children(recursive=True):
                    child.kill()
                process.kill()
    running.unlink()
