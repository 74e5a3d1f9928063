"""The guarantees in the documentation are what the suite observed. Runs last, see conftest.py."""

from __future__ import annotations

from tests.faults.rows import COMMITTED, OBSERVED, read
from tests.faults.table import PAGE, page_with

ADVICE = "if this is as it should be, run python -m tests.faults.table"


def test_this_run_saw_what_the_table_says() -> None:
    committed = read(COMMITTED)
    for case, row in read(OBSERVED).items():
        assert committed.get(case) == row, ADVICE


def test_the_page_shows_the_rows() -> None:
    rows = list(read(COMMITTED).values())
    assert page_with(PAGE.read_text(), rows) == PAGE.read_text(), ADVICE


def test_at_most_one_effect_unless_the_author_said_rerun() -> None:
    """And nobody is left without an answer, but where Celery had thrown the message away with its worker."""
    for row in read(COMMITTED).values():
        lost = "back without its data, then a duplicate" in row.fault
        assert row.effects <= 1 or row.policy == "rerun" or lost, row
        gone = row.fault.startswith("worker killed") and row.acks == "early"
        assert gone or not row.sees.startswith("nothing"), row
