"""What the suite observed: one row for each fault, policy, acknowledgement and broker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

OBSERVED = ROOT / "build" / "faults.jsonl"
"""A line for each case that a test observed since the table was last written."""

COMMITTED = Path(__file__).with_name("observed.jsonl")
"""What the table in docs/guarantees.md shows, sorted."""

ADVICE = "if this is as it should be, run python -m tests.faults.table"


class Row(NamedTuple):
    """One case.

    Attributes:
        fault: what was done to it.
        policy: ``on_crash``, or "reconcile".
        acks: "early", "late" or "late+reject" (with ``reject_on_worker_lost``).
        broker: "rabbitmq" or "redis".
        effects: counted at the destination.
        sees: what the caller of the message got.
        ends: state of the record.
    """

    fault: str
    policy: str
    acks: str
    broker: str
    effects: int
    sees: str
    ends: str

    @property
    def case(self) -> tuple[str, str, str, str]:
        return self.fault, self.policy, self.acks, self.broker


def observe(row: Row) -> None:
    """Write a row down. Several test processes may do so at once: each line is one write."""
    OBSERVED.parent.mkdir(exist_ok=True)
    with OBSERVED.open("a") as file:
        file.write(json.dumps(row._asdict()) + "\n")


def read(path: Path) -> dict[tuple[str, str, str, str], Row]:
    """Rows by case; the last of a case counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (Row(**json.loads(line)) for line in lines)
    return {row.case: row for row in rows}


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in sorted(rows)))
