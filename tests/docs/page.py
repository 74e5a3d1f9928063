"""Runs one page of the documentation: ``python -m tests.docs.page README.md redis://127.0.0.1:6379``.

The blocks of a page run from top to bottom, in one process and a temporary folder:

* ``python``: all blocks run in one module. If a block defines a Celery application named ``app``, a worker (threads, in
  this process) serves it and its tasks, including tasks of later blocks.
* ``python title="shop.py"``: the block is written to that file.
* ``console``: each line ``$ python …``, ``$ celery …`` and ``$ redis-cli …`` runs and must print the lines below it.
  ``…`` in these lines matches any text. ``celery … worker`` and ``redis-server … &`` run until the page ends. Other
  commands do not run.

``localhost:6379`` in a block is replaced by the server's address, and the ports in ``OWN_PORTS`` by free ones. Code
that a page does not show is in a comment: Python from ``<!-- setup`` to ``-->`` runs too. A Python block below the
comment ``<!-- not run: reason -->`` is only compiled. ``after/README.py`` runs at the end of README.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from tests.docs.billing import Billing
from tests.support import forks
from tests.support.processes import Program
from tests.support.servers import free_port
from tests.support.workers import CeleryWorker

if TYPE_CHECKING:
    from celery.contrib.testing.worker import TestWorkController

ROOT = Path(__file__).resolve().parents[2]

# Seconds that one line of a console block may take. It may start Celery or wait for a lease, on a slow machine.
PATIENCE = 120.0

OWN_PORTS = ("6390", "6391")
"""Ports of servers that a page starts itself, because it breaks them."""

_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^(?P<skip><!-- not run:[^>]*-->\n+)?(?P<indent> *)```(?P<language>python|console)\b(?P<info>[^\n]*)\n"
    r"(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """One block of a page. ``line`` is the number of its first line of code."""

    language: str
    code: str
    line: int
    title: str
    skip: bool


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text = page.read_text()
    for found in _BLOCK.finditer(text):
        part = "setup" if found["setup"] is not None else "code"
        line = text.count("\n", 0, found.start(part)) + 1
        indent = found["indent"] or ""
        code = "".join(row.removeprefix(indent) for row in found[part].splitlines(keepends=True))
        title = re.search(r'title="([^"]+)"', found["info"] or "")
        yield Block(
            "python" if part == "setup" else found["language"],
            code,
            line,
            title[1] if title else "",
            found["skip"] is not None,
        )


class Page:
    """One run of one page."""

    def __init__(self, path: Path, server: str, folder: Path) -> None:
        self.path = path
        self.address = urlsplit(server).netloc
        self.folder = folder
        self.ending = contextlib.ExitStack()
        self.printed = Path(self.ending.enter_context(tempfile.TemporaryDirectory()))
        self.workers: dict[int, TestWorkController] = {}  # in this process, by the id of the application
        self.running: list[contextlib.AbstractContextManager[TestWorkController]] = []
        self.started: dict[str, CeleryWorker] = {}  # started by a command of the page, by application
        self.ports: dict[str, str] = {}
        self.module = types.ModuleType("page")
        self.module.__dict__["billing"] = Billing()
        sys.modules["page"] = self.module
        sys.path.insert(0, str(folder))

    def run(self, block: Block) -> None:
        code = re.sub("|".join(OWN_PORTS), self.port, block.code.replace("localhost:6379", self.address))
        if block.skip:
            if block.language == "python":
                compile(code, str(self.path), "exec")
        elif block.language == "console":
            self.console(code, block.line)
        elif block.title:
            file = self.folder / block.title
            file.parent.mkdir(exist_ok=True)
            file.write_text(code)
        else:
            self.python(code, block.line, self.path)

    def port(self, written: re.Match[str]) -> str:
        if written[0] not in self.ports:
            self.ports[written[0]] = str(free_port())
        return self.ports[written[0]]

    def python(self, code: str, line: int, source: Path) -> None:
        self.serve()
        # Empty lines in front make a traceback show the line numbers of the page.
        exec(compile("\n" * (line - 1) + code, str(source), "exec"), self.module.__dict__)  # noqa: S102

    def serve(self) -> None:
        """Start a worker for the current application of the page, or tell it about new tasks."""
        from celery.contrib.testing.worker import start_worker
        from kombu.asynchronous import set_event_loop

        app = self.module.__dict__.get("app")
        if app is None or not hasattr(app, "tasks"):
            return
        worker = self.workers.get(id(app))
        if worker is None:
            # The context is never left. Celery's flag for stopping is shared by all workers of a process, and one of
            # two workers may miss it. The process ends with `os._exit` instead.
            # A worker uses the event loop of the process if there is one. Two workers with one loop read each other's
            # sockets, and then nothing serves the messages. So the loop is removed first.
            set_event_loop(None)
            running = start_worker(app, pool="threads", concurrency=4, perform_ping_check=False)
            worker = self.workers[id(app)] = running.__enter__()
            self.running.append(running)
        worker.consumer.update_strategies()

    def console(self, text: str, line: int) -> None:
        lines = text.splitlines()
        at = [n for n, row in enumerate(lines) if row.startswith("$ ")] + [len(lines)]
        for here, there in pairwise(at):
            expected = "\n".join(lines[here + 1 : there])
            self.command(lines[here].removeprefix("$ "), expected, line + here)

    def command(self, command: str, expected: str, line: int) -> None:
        words = shlex.split(command)
        if words[0] == "redis-server":
            self.redis_server([word for word in words if word != "&"])
            return
        if words[0] not in ("python", "celery", "redis-cli"):
            return
        if words[0] == "celery" and "worker" in words:
            app = words[words.index("-A") + 1]
            if app in self.started:  # the page starts this worker again
                self.started.pop(app).stop()
            processes = int(words[words.index("--concurrency") + 1]) if "--concurrency" in words else 2
            worker = self.started[app] = CeleryWorker(
                app, self.folder, concurrency=processes, name=f"line{line}"
            )
            self.ending.callback(worker.kill)
            return
        env = {
            **os.environ,
            "PYTEST_ADDOPTS": "-p no:langsmith_plugin -p no:schemathesis",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(self.folder)]),
            "NO_COLOR": "1",
        }
        if words[0] == "celery":
            words = ["python", "-m", *words]
        if words[0] == "python" and "-c" not in words:
            printed = self.forked(words[1:], env)
        else:
            words[0] = sys.executable if words[0] == "python" else words[0]
            done = subprocess.run(
                words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=PATIENCE
            )
            printed = (done.stdout + done.stderr).strip()
        assert re.fullmatch(_pattern(expected), printed, re.DOTALL), (
            f"{self.path.name}:{line}: $ {command}\nthe page says:\n{expected}\nit printed:\n{printed}"
        )

    def forked(self, words: list[str], env: dict[str, str]) -> str:
        """Run a Python program and return what it prints."""
        out, errors = self.printed / "out", self.printed / "errors"
        for file in (out, errors):
            file.write_text("")
        run = forks.start(words, log=out, errors=errors, env=env, cwd=self.folder)
        try:
            run.wait(PATIENCE)
        finally:
            if run.poll() is None:
                os.kill(run.pid, signal.SIGKILL)
        return (out.read_text() + errors.read_text()).strip()

    def redis_server(self, words: list[str]) -> None:
        port = words[words.index("--port") + 1]
        server = Program(words, log=self.folder / f"redis-{port}.log", cwd=self.folder)
        self.ending.callback(server.kill)
        server.wait_until_ready(lambda: "Ready to accept connections" in server.log_text(), PATIENCE)


def _pattern(expected: str) -> str:
    return ".*".join(re.escape(part) for part in expected.strip().split("…"))


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # relative paths in blocks are in this folder
        page = Page(path, sys.argv[2], Path(folder))
        with page.ending:
            for block in blocks(path):
                page.run(block)
            more = Path(__file__).parent / "after" / f"{path.stem}.py"
            if more.exists():
                page.python(more.read_text(), 1, more)


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # do not wait for the threads of the workers in this process
