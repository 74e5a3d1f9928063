"""The table in the documentation shows the rows that the fault tests compare with (`Case.row`)."""

from __future__ import annotations

from tests.faults.rows import ADVICE, COMMITTED, read
from tests.faults.table import PAGE, page_with


def test_the_page_shows_the_rows() -> None:
    rows = list(read(COMMITTED).values())
    assert page_with(PAGE.read_text(), rows) == PAGE.read_text(), ADVICE


def test_at_most_one_effect_unless_the_author_said_rerun() -> None:
    """An action has at most one effect unless its policy is "rerun" or the store lost its data.

    Each caller receives an answer, except where Celery dropped the message with its worker.
    """
    for row in read(COMMITTED).values():
        lost = "back without its data, then a duplicate" in row.fault
        assert row.effects <= 1 or row.policy == "rerun" or lost, row
        gone = row.fault.startswith("worker killed") and row.acks == "early"
        assert gone or not row.sees.startswith("nothing"), row
