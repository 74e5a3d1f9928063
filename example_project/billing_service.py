"""The destination: a billing service over HTTP, with its ledger in SQLite.

    python -m example_project.billing_service --ledger ledger.sqlite3 --port 8765

| request | does |
|---|---|
| `POST /invoices`, `/reminders`, `/refunds`, `/emails` | writes one line to the ledger; 201 with its number |
| `GET /invoices?reference=…` (and the other three) | the lines with that reference, oldest first |
| `GET /letters?invoice_id=…` | the text of a cover letter; changes nothing |
| `GET /health` | 200 |
| `POST /faults` | arms a fault for the next request: `{"path", "invoice_id", "fault", "seconds"}` |
| `GET /faults` | the faults that still wait for their request |

A line holds `invoice_id`, `reference` and the other fields of the request. The service does NOT deduplicate: two
requests are two lines, as in most services. It can be queried by the caller's reference.

Faults, both after the work is committed: `drop` closes the connection instead of answering; `stall` answers
late.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import sqlite3
import sys
import threading
import urllib.parse
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KINDS = {"/invoices": "invoice", "/reminders": "reminder", "/refunds": "refund", "/emails": "email"}
MAX_BODY = 64 * 1024  # far above the requests of the demo
LOCK_WAIT = 5.0  # seconds SQLite waits for another thread's commit; commits here take milliseconds


class Ledger:
    """The lines, one per effect. Each use opens a connection, so that threads share only the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with closing(self._connect()) as db, db:
            db.execute(
                "CREATE TABLE IF NOT EXISTS lines (number INTEGER PRIMARY KEY, kind TEXT NOT NULL,"
                " invoice_id TEXT NOT NULL, reference TEXT NOT NULL, details TEXT NOT NULL)"
            )
            db.execute("CREATE INDEX IF NOT EXISTS by_reference ON lines (kind, reference)")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=LOCK_WAIT)

    def add(self, kind: str, invoice_id: str, reference: str, details: dict[str, Any]) -> int:
        """Write and commit one line, and return its number."""
        with closing(self._connect()) as db, db:
            number = db.execute(
                "INSERT INTO lines (kind, invoice_id, reference, details) VALUES (?, ?, ?, ?)",
                (kind, invoice_id, reference, json.dumps(details)),
            ).lastrowid
        assert number is not None  # an INSERT into a table with an INTEGER PRIMARY KEY always has one
        return number

    def by_reference(self, kind: str, reference: str) -> list[int]:
        """Return the numbers of the lines with a reference."""
        with closing(self._connect()) as db:
            rows = db.execute(
                "SELECT number FROM lines WHERE kind = ? AND reference = ? ORDER BY number", (kind, reference)
            ).fetchall()
        return [number for (number,) in rows]


class Faults:
    """Faults armed for one path and invoice, each for the next such request only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: dict[tuple[str, str], tuple[str, float]] = {}

    def arm(self, path: str, invoice_id: str, fault: str, seconds: float) -> None:
        if fault not in ("drop", "stall"):
            raise ValueError(f"unknown fault {fault!r}: use 'drop' or 'stall'")
        with self._lock:
            self._armed[path, invoice_id] = (fault, seconds)

    def waiting(self) -> list[str]:
        with self._lock:
            return [f"{path} {invoice_id}: {fault}" for (path, invoice_id), (fault, _) in self._armed.items()]

    def take(self, path: str, invoice_id: str) -> tuple[str, float]:
        """Return the fault for this request and its seconds; ("", 0) for none."""
        with self._lock:
            return self._armed.pop((path, invoice_id), ("", 0.0))


def answer_line(kind: str, number: int) -> dict[str, Any]:
    """Return the answer about one line."""
    return {"number": f"{kind}-{number}"}


class Handler(BaseHTTPRequestHandler):
    ledger: Ledger
    faults: Faults
    closing: threading.Event

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path == "/faults":
                self.faults.arm(body["path"], body["invoice_id"], body["fault"], float(body["seconds"]))
                self._answer(200, {})
            elif self.path in KINDS:
                invoice_id, reference = str(body.pop("invoice_id")), str(body.pop("reference"))
                number = self.ledger.add(KINDS[self.path], invoice_id, reference, body)
                self._answer_unless_faulty(201, answer_line(KINDS[self.path], number), self.path, invoice_id)
            else:
                self._answer(404, {"error": f"no such path: {self.path}"})
        except (KeyError, TypeError, ValueError) as error:
            self._answer(400, {"error": f"cannot read the request: {error!r}"})

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        if path == "/health":
            self._answer(200, {})
        elif path == "/faults":
            self._answer(200, self.faults.waiting())
        elif path in KINDS and "reference" in asked:
            numbers = self.ledger.by_reference(KINDS[path], asked["reference"])
            self._answer(200, [answer_line(KINDS[path], number) for number in numbers])
        elif path == "/letters" and "invoice_id" in asked:
            letter = {"text": f"Please find attached invoice {asked['invoice_id']}."}
            self._answer_unless_faulty(200, letter, path, asked["invoice_id"])
        else:
            self._answer(404, {"error": f"no such path or query: {self.path}"})

    def _answer_unless_faulty(self, status: int, body: Any, path: str, invoice_id: str) -> None:
        fault, seconds = self.faults.take(path, invoice_id)
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "stall":
            self.closing.wait(seconds)
        self._answer(status, body)

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length <= MAX_BODY:
            raise ValueError(f"a JSON body of 1 to {MAX_BODY} bytes is needed, got {length}")
        body = json.loads(self.rfile.read(length))
        if not isinstance(body, dict):
            raise ValueError("the JSON body must be an object")
        return body

    def _answer(self, status: int, body: Any) -> None:
        payload = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)
        except ConnectionError:
            self.close_connection = True  # the caller was killed meanwhile; the ledger line stays

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        print(self.command, self.path, int(code), flush=True)


def make_server(ledger: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server that is bound and not serving yet. Port 0 takes any free port."""
    handler = type(
        "BillingHandler",
        (Handler,),
        {"ledger": Ledger(ledger), "faults": Faults(), "closing": threading.Event()},
    )
    return ThreadingHTTPServer((host, port), handler)


def main() -> int:
    parser = argparse.ArgumentParser(description="The example's billing service.")
    parser.add_argument("--ledger", type=Path, required=True, help="SQLite file, made if it does not exist")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8765, help="0 takes any free port and prints it")
    options = parser.parse_args()
    # As PID 1 of a container there is no default action for SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with make_server(options.ledger, options.host, options.port) as server:
        print(f"listening on http://{options.host}:{server.server_address[1]}", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
