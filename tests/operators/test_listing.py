"""A listing names each intent once, although SCAN may repeat keys.

The beginning of a key stands for an intent only if no other key begins with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery

from celery_idem import IdempotencyError, Ledger
from celery_idem.engine import ledger as ledger_module
from celery_idem.operate.operators import Operator
from celery_idem.stores.memory import MemoryStore
from tests.operators.conftest import Idem
from tests.operators.intents import claimed, in_doubt, succeeded


@pytest.fixture(autouse=True)
def repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the scan name every key three times: some copies follow at once, others at the end."""
    scan = MemoryStore.scan

    def again(self: MemoryStore, prefix: str) -> Iterator[object]:
        found = list(scan(self, prefix))
        yield from [*found[:1] * 2, *found[1:], *found, *found[1:]]

    monkeypatch.setattr(MemoryStore, "scan", again)


def test_each_intent_is_listed_and_counted_once(app: Celery, ledger: Ledger, idem: Idem) -> None:
    keys = [f"shop.send_invoice:{number:032x}" for number in range(5)]
    for key in keys:
        in_doubt(ledger, key)
    assert sorted(entry.key for entry in ledger.list()) == keys
    assert sorted(entry.key for entry in ledger.list("in_doubt")) == keys
    assert [tally.intents for tally in Operator(app).stats().values()] == [5]
    assert len(idem("list", "--json").output.splitlines()) == 5
    for words in (("--state", "waiting"), ("--limit", "3"), ("--limit", "2", "--page", "2")):
        people = [line.split()[2] for line in idem("list", *words).output.splitlines() if ":0000" in line]
        assert [
            json.loads(line)["key"] for line in idem("list", "--json", *words).output.splitlines()
        ] == people


def test_the_memory_is_bounded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "REMEMBERED", 2)
    keys = [f"shop.send_invoice:{number:032x}" for number in range(20)]
    for key in keys:
        succeeded(ledger, key)
    found = [entry.key for entry in ledger.list()]
    assert sorted(set(found)) == keys  # none is missing
    assert found[0] != found[1]  # a key that is repeated at once is left out
    assert len(found) > 20  # a key that is repeated much later is not


@pytest.mark.parametrize("command", ["show", "forget", "resolve"])
def test_the_beginning_of_several_keys_is_none_of_them(idem: Idem, ledger: Ledger, command: str) -> None:
    keys = [f"shop.send_invoice:{number:032x}" for number in range(2)]
    for key in keys:
        in_doubt(ledger, key)
    more = {"resolve": ["--not-happened", "--evidence", "looked", "--yes"], "forget": ["--yes"]}.get(
        command, []
    )
    for start in ("shop.send_invoice:000", "s", ""):
        run = idem(command, start, *more)
        assert run.exit_code == 1, run.output
    assert "Give more of the key" in idem(command, "shop", *more).output
    assert sorted(entry.key for entry in ledger.list("in_doubt")) == keys


def test_the_beginning_of_one_key_is_that_one(idem: Idem, ledger: Ledger) -> None:
    keys = [f"shop.send_invoice:{number}{'0' * 31}" for number in range(2)]
    for key in keys:
        in_doubt(ledger, key)
    assert idem("forget", "shop.send_invoice:1", "--yes").exit_code == 0
    assert [entry.key for entry in ledger.list()] == keys[:1]


@pytest.mark.parametrize("state", ["indoubt", "done", "", "RUNNING ", "busy", 1, b"running"])
def test_a_state_that_does_not_exist(ledger: Ledger, app: Celery, state: Any) -> None:
    claimed(ledger, f"shop.send_invoice:{1:032x}")
    with pytest.raises(IdempotencyError, match=r"running, scheduled, .*in_doubt, .*lapsed"):
        ledger.list(state)  # at once, not at the first entry
    with pytest.raises(IdempotencyError, match="There is no state"):
        list(Operator(app).list(state))
    assert [entry.state for entry in ledger.list("RUNNING")] == ["running"]
