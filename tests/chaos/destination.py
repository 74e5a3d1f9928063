"""The destination of all effects, and its client. It runs in a process that no fault touches.

    python -m tests.chaos.destination FOLDER PORT

It behaves as a careful payment service. A client can ask what became of an action, by reference. Asking also voids the
requests of earlier executions that have not arrived yet: every request has the fence of its claim. A request may have
an idempotency key. Without one, a request that is sent twice is done twice. `FOLDER/effects.jsonl` is its ledger,
written and synced before it replies.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tests.chaos.plan import Plan
from tests.support.effects import Effects

WITHIN = 30.0  # seconds to wait for a reply: the destination is always up, but the machine may be busy


# -- the client, in workers ---------------------------------------------------------------------------------
def tell(port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Send one request and return the reply. Raise OSError if the destination does not run, which is never planned."""
    with socket.create_connection(("127.0.0.1", port), timeout=WITHIN) as connection:
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
        return answer


# -- the service --------------------------------------------------------------------------------------------
class Books:
    """The ledger of the destination and its state."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._plan = plan
        self._effects = Effects(folder / "effects.jsonl")
        self._requests = Effects(folder / "requests.jsonl")
        self._lock = threading.Lock()
        self._receipts: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._keys: dict[str, int] = {}
        self._void_below: Counter[tuple[str, str]] = Counter()
        self._busy: Counter[str] = Counter()
        self._number = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        ref, part = request["ref"], request["part"]
        if request["do"] == "ask":
            told = self._ask(ref, part, request["void_below"])
        else:
            intent = self._plan.intent(int(ref[1:])) if ref.startswith("i") else None
            lasts = intent.during if intent is not None else 0.0
            time.sleep(lasts / 2)  # the way of the request; below, the way of the reply
            told = self._do(ref, part, request, intent)
            time.sleep(lasts / 2)
        self._requests.add(ref, at=time.time(), request=request, told=told)
        return told

    def _ask(self, ref: str, part: str, void_below: int) -> dict[str, Any]:
        with self._lock:
            place = (ref, part)
            self._void_below[place] = max(self._void_below[place], void_below)
            receipts = self._receipts[place]
            return {"receipt": receipts[0] if receipts else None}

    def _do(self, ref: str, part: str, request: dict[str, Any], intent: Any) -> dict[str, Any]:
        place = (ref, part)
        with self._lock:
            if request["fence"] and request["fence"] < self._void_below[place]:
                return {"refused": "void"}
            if request["key"] in self._keys:
                return {"receipt": self._keys[request["key"]], "repeated": True}
            if intent is not None and self._busy[ref] < intent.busy:
                self._busy[ref] += 1
                return {"refused": "busy"}
            if intent is not None and intent.declined:
                return {"refused": "declined"}
            self._number += 1
            about = {name: value for name, value in request.items() if name not in ("do", "ref")}
            self._effects.add(ref, receipt=self._number, at=time.time(), **about)
            self._receipts[place].append(self._number)
            if request["key"]:
                self._keys[request["key"]] = self._number
            return {"receipt": self._number}


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        if line:
            told = self.server.books.answer(json.loads(line))  # type: ignore[attr-defined]
            self.wfile.write(json.dumps(told).encode() + b"\n")


class _Service(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log nothing: clients may be killed before they receive the reply."""


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    with _Service(("127.0.0.1", port), _Handler) as service:
        service.books = Books(folder, Plan.from_json(os.environ["CHAOS_PLAN"]))  # type: ignore[attr-defined]
        print("destination ready", flush=True)
        service.serve_forever()


if __name__ == "__main__":
    main()
