"""A process is killed while it writes: the record and the result that its caller sees never disagree."""

from __future__ import annotations

import multiprocessing
import select
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from celery_idem import Ledger
from tests.celery.answers_app import run, shop

pytestmark = pytest.mark.redis

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.celery.answers_app", "celery.backends.redis"])


class Cutter:
    """A proxy that forwards the first ``most`` bytes that a process sends, then kills the process."""

    def __init__(self, target: int, most: int) -> None:
        self._target, self._left = target, most
        self.sent = 0
        self.victim: Any = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.close()
        self._thread.join(10)

    def _serve(self) -> None:
        ends: dict[socket.socket, tuple[socket.socket, bool]] = {}
        while True:
            readable, _, _ = select.select([self._listener, self._stopped, *ends], [], [])
            if self._stopped in readable:
                break
            for one in readable:
                if one is self._listener:
                    client, _ = self._listener.accept()
                    server = socket.create_connection(("127.0.0.1", self._target))
                    ends[client], ends[server] = (server, True), (client, False)
                elif one in ends:
                    other, from_client = ends[one]
                    if not self._pass_on(one, other, from_client):
                        for end in (one, other):
                            ends.pop(end, None)
                            end.close()
        for end in (self._listener, self._stopped, *ends):
            end.close()

    def _pass_on(self, one: socket.socket, other: socket.socket, from_client: bool) -> bool:
        try:
            data = one.recv(1 << 16)
            if from_client:
                data, last = data[: self._left], len(data) >= self._left
                self.sent += len(data)
                self._left -= len(data)
                if last:
                    self.victim.kill()  # SIGKILL
                    self.victim.join(10)
            if data:
                other.sendall(data)
            return bool(data)
        except OSError:
            return False


def killed_after(url: str, effects: Path, order: str, most: int, apart: bool = False) -> int:
    """Run a call in a process that is killed after ``most`` bytes. Return how many bytes were forwarded."""
    port = urlsplit(url).port
    assert port is not None
    cutter = Cutter(port, most)
    through = url.replace(f":{port}/", f":{cutter.port}/")
    cutter.victim = process = processes.Process(target=run, args=(through, str(effects), order, apart))
    process.start()
    process.join(60)
    cutter.close()
    return cutter.sent


def sent_by_one_that_lives(url: str, effects: Path, apart: bool = False) -> int:
    killed_after(url, effects, "first", 1 << 20, apart)  # this call loads the scripts into the server
    return killed_after(url, effects, "whole", 1 << 20, apart)


def seen(url: str, order: str) -> tuple[str, str]:
    """Return the state of the record and the state of the result that the caller sees."""
    pay = shop(url, "")
    entry = Ledger.from_app(pay.app).get(pay.intent_key(order))
    return (entry.state if entry else "absent"), pay.app.backend.get_task_meta(order)["status"]


AGREE = {("absent", "PENDING"), ("running", "PENDING"), ("succeeded", "SUCCESS")}


@pytest.mark.slow
def test_killed_anywhere_caller_and_record_agree(redis_url: str, tmp_path: Path) -> None:
    effects = tmp_path / "effects"
    whole = sent_by_one_that_lives(redis_url, effects)
    assert seen(redis_url, "whole") == ("succeeded", "SUCCESS")
    found = set()
    # Every six bytes in the last thirty, and every forty bytes before them.
    for most in (*range(1, whole - 30, 40), *range(whole - 30, whole + 1, 6), whole):
        order = f"o{most}"
        killed_after(redis_url, effects, order, most)
        found.add(seen(redis_url, order))
        assert found <= AGREE, most
    assert found == AGREE
    orders = effects.read_text().split()
    assert len(orders) == len(set(orders))


def test_where_celery_writes_after_the_outcome_they_can_disagree(redis_url: str, tmp_path: Path) -> None:
    """Without the combined write, a kill leaves a stored outcome without a result. So the test above can fail."""
    effects = tmp_path / "effects"
    whole = sent_by_one_that_lives(redis_url, effects, apart=True)
    found = set()
    for most in range(whole - 400, whole, 40):
        killed_after(redis_url, effects, f"o{most}", most, apart=True)
        found.add(seen(redis_url, f"o{most}"))
    assert ("succeeded", "PENDING") in found, (whole, found)
