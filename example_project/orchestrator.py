"""Dispatches tasks by name, without importing them, as most orchestrators do.

As a program it reads one call per line from standard input, dispatches it at once, and writes one answer per line:

    {"id": 1, "name": "billing.send_invoice", "kwargs": {…}, "occurrence": null}
    {"id": 1, "outcome": "done", "answer": {"number": "invoice-1"}, "seen": "…"}
"""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any

from celery.exceptions import TimeoutError as NoResultYet

from example_project import witness
from example_project.app import app

# Seconds: longer than any fault of the demo, so that every call gets its answer.
PATIENCE = 25.0


@dataclass(frozen=True)
class Answer:
    """The final answer to a call."""

    outcome: str  # "done", "failed", "in_doubt", or "no_answer" when the patience ran out
    answer: Any  # the task's result when done
    seen: str  # the text for a model


def dispatch(
    name: str,
    args: list[Any] | None = None,
    kwargs: dict[str, Any] | None = None,
    occurrence: str | None = None,
    patience: float = PATIENCE,
) -> Answer:
    """Send one call and wait up to `patience` seconds for its answer."""
    # The guard in the worker needs only this header; plain Celery ignores it.
    headers = {"idem-occurrence": occurrence} if occurrence else {}
    result = app.send_task(name, args=args or [], kwargs=kwargs or {}, headers=headers)
    try:
        value = result.get(timeout=patience)
    except NoResultYet:
        return Answer(
            "no_answer", None, f"The tool did not answer within {patience:g} seconds. Please try again."
        )
    except Exception as error:  # the task's error is the answer
        outcome = "in_doubt" if type(error).__name__ == "OutcomeUnknown" else "failed"
        return Answer(outcome, None, f"An error occurred while running the tool: {error}. Please try again.")
    return Answer("done", value, json.dumps(value))


def main() -> int:
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=3)
    say = threading.Lock()

    def serve(call: dict[str, Any]) -> None:
        answer = dispatch(call["name"], kwargs=call["kwargs"], occurrence=call["occurrence"])
        with say:
            print(json.dumps({"id": call["id"], **asdict(answer)}), flush=True)

    witness.note("ready", who="orchestrator")
    for line in sys.stdin:
        threading.Thread(target=serve, args=(json.loads(line),), daemon=True).start()
    return 0


if __name__ == "__main__":
    sys.exit(main())
