"""One RabbitMQ for all test processes of a run, because it takes more CPU to start than any other server.

The first process that needs it starts it. The controller of pytest-xdist ends it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from pathlib import Path

import psutil

from tests.support.servers import RabbitMQServer

RUNNING = "running.json"
"""The server's port, and the pid and start time of each process. The start time detects a reused pid."""


def rabbitmq(folder: Path) -> RabbitMQServer:
    """The server of this folder, started if it does not run yet. No test may end or freeze it.

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
    """Ends the server of this folder, if one was started."""
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
