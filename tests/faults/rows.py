"""Rows of what the fault tests observed: one for each fault, policy, acknowledgement and broker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

OBSERVED = ROOT / "build" / "faults.jsonl"
"""One line for each case observed since the table was last written."""

COMMITTED = Path(__file__).with_name("observed.jsonl")
"""The rows of the table in docs/guarantees.md, sorted."""

ADVICE = "if this is as it should be, run python -m tests.faults.table"


class Row(NamedTuple):
    """One case.

    Attributes:
        fault: what the test did to the call.
        policy: ``on_crash``, or "reconcile".
        acks: "early", "late" or "late+reject" (with ``reject_on_worker_lost``).
        broker: "rabbitmq" or "redis".
        effects: counted at the destination.
        sees: the answer that the caller received.
        ends: the final state of the record.
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
    """Append a row to the file. Each line is one write, because several test processes append at once."""
    OBSERVED.parent.mkdir(exist_ok=True)
    with OBSERVED.open("a") as file:
        file.write(json.dumps(row._asdict()) + "\n")


def read(path: Path) -> dict[tuple[str, str, str, str], Row]:
    """Return the rows by case. The last row of a case counts."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (Row(**json.loads(line)) for line in lines)
    return {row.case: row for row in rows}


def write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in sorted(rows)))
