"""The caller processes seen from the simulator: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from dataclasses import dataclass
from typing import Any

from example_project.processes import NotInTime

ANSWER = 30.0  # seconds to wait for the next line of a caller: longer than an orchestrator itself waits


@dataclass(frozen=True)
class Call:
    """One intent, as an orchestrator is asked to dispatch it."""

    name: str
    kwargs: dict[str, Any]
    occurrence: str | None = None

    @property
    def invoice_id(self) -> str:
        return str(self.kwargs.get("invoice_id") or self.kwargs["order_id"])


@dataclass(frozen=True)
class Heard:
    """The final answer that a caller received."""

    call: Call
    outcome: str  # see `orchestrator.Answer`
    answer: dict[str, Any] | None
    calls: int = 1  # the number of calls that it made


class Caller:
    """An agent or orchestrator process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        # A pipe cannot be read with a time limit; a queue that a thread fills can.
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None  # started with talk=True
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def tell(self, value: Any) -> None:
        assert self.process.stdin is not None  # started with talk=True
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Return its next line. Raises `NotInTime`, also when the process has ended."""
        try:
            line = self._lines.get(timeout=ANSWER)
        except queue.Empty:
            raise NotInTime(f"no answer from a caller within {ANSWER:g} s") from None
        if line is None:
            raise NotInTime("a caller ended before its last answer")
        said: dict[str, Any] = json.loads(line)
        return said
