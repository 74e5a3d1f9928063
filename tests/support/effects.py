"""The destination of side effects, and a gate. Both are files, so that all processes see the same state."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from tests.support.waiting import wait_for


class Effects:
    """A ledger that tasks in any process append to, and tests count.

    One line for each effect, written with O_APPEND in one call and synced. So an added effect stays even if the
    process is killed at the next instruction, and two writers never mix their lines.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, intent: str, **details: object) -> None:
        """Records one effect of `intent`, with `details` (JSON values) and the writer's pid."""
        line = json.dumps({"intent": intent, "pid": os.getpid(), **details}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    def all(self) -> list[dict[str, object]]:
        """Every effect, the oldest first."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def of(self, intent: str) -> list[dict[str, object]]:
        """The effects of one intent."""
        return [effect for effect in self.all() if effect["intent"] == intent]

    def count(self, intent: str | None = None) -> int:
        """How often `intent` took effect. Without a name, the number of all effects."""
        return len(self.all() if intent is None else self.of(intent))

    def counts(self) -> Counter[str]:
        """The number of effects by intent. Each should be 1."""
        return Counter(str(effect["intent"]) for effect in self.all())

    def wait(self, intent: str, count: int = 1, timeout: float = 60.0) -> list[dict[str, object]]:
        """Waits until `intent` took effect `count` times or more, and returns these effects."""
        wait_for(
            lambda: self.count(intent) >= count, timeout, lambda: f"{count} × {intent!r} in {self.counts()}"
        )
        return self.of(intent)


class Gate:
    """Holds a task at a point until the test opens it. Closed at first."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def is_open(self) -> bool:
        return self.path.exists()

    def open(self) -> None:
        self.path.touch()

    def wait(self, timeout: float = 60.0) -> None:
        """Waits until the gate is open. Raises AssertionError after `timeout` seconds."""
        wait_for(lambda: self.is_open, timeout, f"the gate {self.path}")
