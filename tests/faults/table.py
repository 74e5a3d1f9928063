"""Writes the table in docs/guarantees.md from what the fault tests observed.

`python -m tests.faults.table` moves the rows observed since its last run (build/faults.jsonl) to
tests/faults/observed.jsonl and rewrites the table.
"""

from __future__ import annotations

from collections import defaultdict

from tests.faults.rows import COMMITTED, OBSERVED, ROOT, Row, read, write

PAGE = ROOT / "docs" / "guarantees.md"
BEGIN = "<!-- observed: written by `python -m tests.faults.table` -->"
END = "<!-- end of observed -->"

POLICIES = ("in_doubt", "resume", "rerun", "reconcile")
ACKS = ("early", "late", "late+reject")
BROKERS = ("rabbitmq", "redis")
NAMES = {"rabbitmq": "RabbitMQ", "redis": "Redis"}


def render(rows: list[Row]) -> str:
    """Return the table. Cases of a fault and a policy that ended in the same way share one line."""
    alike: dict[tuple[str, str, int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.fault, row.policy, row.effects, row.sees, row.ends].append(row)
    lines = [
        "| fault | policy | acknowledged | broker | effects | what the caller sees | record |",
        "|---|---|---|---|---|---|---|",
    ]
    order = sorted(alike.items(), key=lambda item: (item[0][0], POLICIES.index(item[0][1]), item[0][2:]))
    for (fault, policy, effects, sees, ends), cases in order:
        acks = ", ".join(a for a in ACKS if any(case.acks == a for case in cases))
        brokers = ", ".join(NAMES[b] for b in BROKERS if any(case.broker == b for case in cases))
        lines.append(f"| {fault} | {policy} | {acks} | {brokers} | {effects} | {sees} | {ends} |")
    return "\n".join(lines)


def page_with(text: str, rows: list[Row]) -> str:
    """Return the page with a new table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render(rows)}\n\n{END}{after}"


def main() -> None:
    """Move the rows and rewrite the table."""
    rows = list((read(COMMITTED) | read(OBSERVED)).values())
    write(COMMITTED, rows)
    OBSERVED.unlink(missing_ok=True)
    PAGE.write_text(page_with(PAGE.read_text(), rows))
    print(f"{len(rows)} cases in {COMMITTED.relative_to(ROOT)}; wrote the table in {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
