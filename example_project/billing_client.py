"""The client of the billing service: POST, GET, and errors that say what is known about the effect.

- `NotReached`: no connection was made, so nothing happened.
- `NoAnswer`: the request went out and no answer came back. It may have happened. This is the one that charges
  customers twice.
- `Refused`: the service answered with an error status, so nothing happened.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from example_project import witness

# Longer than the slowest answer that the simulator causes (9 s), so that a slow answer is no timeout.
TIMEOUT = 10.0
# No proxy: the billing service of the example is always on loopback or in the same compose network.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class NotReached(Exception):
    """No connection to the billing service: nothing happened."""


class NoAnswer(Exception):
    """The request was sent and no answer came back: it may have happened."""


class Refused(Exception):
    """The billing service answered with an error status: nothing happened."""


def post(path: str, *, reference: str, invoice_id: str, **fields: Any) -> dict[str, Any]:
    """Cause an effect at the billing service, stored with `reference` for later queries."""
    body = {"reference": reference, "invoice_id": invoice_id, **fields}
    answer: dict[str, Any] = _send("POST", path, invoice_id, json.dumps(body).encode())
    return answer


def get(path: str, **query: str) -> Any:
    """Query the billing service."""
    return _send("GET", f"{path}?{urllib.parse.urlencode(query)}", query.get("invoice_id", ""), None)


def arm(path: str, invoice_id: str, fault: str, seconds: float = 0, base: str | None = None) -> None:
    """Make the service at `base` do `fault` at the next request for path and invoice (for the simulator)."""
    body = {"path": path, "invoice_id": invoice_id, "fault": fault, "seconds": seconds}
    _send("POST", "/faults", invoice_id, json.dumps(body).encode(), base)


def armed(base: str) -> list[str]:
    """Return the faults that wait for their request (for the simulator)."""
    waiting: list[str] = _send("GET", "/faults", "", None, base)
    return waiting


def _send(method: str, path: str, invoice_id: str, body: bytes | None, base: str | None = None) -> Any:
    base = base or os.environ.get("IDEM_DEMO_BILLING", "http://127.0.0.1:8765")
    request = urllib.request.Request(base + path, data=body, method=method)
    request.add_header("Content-Type", "application/json")
    witness.note("call", method=method, path=path.partition("?")[0], invoice_id=invoice_id)
    try:
        with _open(request, timeout=TIMEOUT) as response:
            return json.loads(response.read())
    except urllib.error.HTTPError as error:
        raise Refused(f"{method} {path}: {error.code} {error.read().decode(errors='replace')}") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionRefusedError):
            raise NotReached(f"{method} {base}{path}: {error.reason}") from error
        raise NoAnswer(f"{method} {path}: {error.reason}") from error
    except OSError as error:  # a dropped connection, or no answer within TIMEOUT
        raise NoAnswer(f"{method} {path}: {error}") from error
