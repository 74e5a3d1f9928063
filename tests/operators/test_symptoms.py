"""The table docs/reference/symptoms.md: its commands can be run, and the names in it exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from celery import Celery

from celery_idem import Ledger
from tests.docs.page import ROOT
from tests.operators.conftest import Idem
from tests.operators.intents import claimed
from tests.operators.shop import send_invoice
from tests.operators.test_alerts import TASK, alerts

TABLE = ROOT / "docs" / "reference" / "symptoms.md"
COMMANDS = sorted(set(re.findall(r"`celery -A proj idem ([^`]+)`", TABLE.read_text())))
ROWS = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]


def test_every_alert_has_a_row_with_the_command_that_the_alert_names() -> None:
    rows = {row[0].strip("| `"): row for row in ROWS if row[0].startswith("| `Idem")}
    assert rows.keys() == alerts().keys()
    for name, rule in alerts().items():
        named = re.search(r"celery -A proj idem (\w+(?: --\w+)?)", rule["annotations"]["what_to_do"])
        if named:
            assert f"`celery -A proj idem {named[1]}" in rows[name][1]


def test_what_a_row_is_about_is_a_name_of_the_package() -> None:
    code = "".join(path.read_text() for path in (ROOT / "celery_idem").rglob("*.py"))
    names = {word for row in ROWS for word in re.findall(r"`(\w[\w-]*)`", row[0])} - alerts().keys()
    assert len(names) > 15
    assert {name for name in names if not re.search(rf'"{name}"|class {name}\b', code)} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_commands(
    command: str, app: Celery, ledger: Ledger, idem: Idem, tmp_path: Path
) -> None:
    """Each command runs. It decides nothing, because no question is answered. Status 2 would be wrong usage."""
    key = send_invoice.intent_key("a", 7)
    claimed(ledger, key).doubt("why", 0.0)
    (tmp_path / "decided.jsonl").write_text("")
    call = '{"customer_id": "a", "invoice_id": 7}'
    given = {"KEY": key, "TASK": TASK, "CALL": call, "RESULT": "1", "FILE": str(tmp_path / "decided.jsonl")}
    done = idem(*(given.get(word, word) for word in shlex.split(command)), input="")
    assert done.exit_code in (0, 1), done.output
    entry = ledger.get(key)
    assert entry is not None
    assert entry.state == "in_doubt"
