"""Many decisions at once: from a file, or one decision for several keys. A wrong decision stops no other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis as redis_py
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import Ledger, NotHappened, StoreError
from celery_idem.adapters.inbox import inbox
from celery_idem.cli import reading
from tests.operators.conftest import Idem, use_store
from tests.operators.forms import hidden
from tests.operators.intents import claimed, in_doubt, message, succeeded
from tests.operators.shop import send_invoice

MANY = 5000
TOKEN = "a token of the right length"


def key(customer: str) -> str:
    return send_invoice.intent_key(customer, 7)


def rows(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def state(ledger: Ledger, customer: str) -> str:
    entry = ledger.get(key(customer))
    assert entry is not None
    return entry.state


def decisions(tmp_path: Path, *lines: Any) -> str:
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(
        b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)
    )
    return str(path)


SEEN = {"by": "ann", "evidence": "the list of 14:03"}


def test_every_line_is_decided_and_a_bad_one_stops_nothing(
    idem: Idem, ledger: Ledger, tmp_path: Path
) -> None:
    for customer in ("a", "b", "c", "d", "late"):
        in_doubt(ledger, key(customer))
    claimed(ledger, key("busy"))
    good = [
        {"key": key("a"), "happened": "inv-a", **SEEN},
        {"key": key("b"), "not_happened": True, **SEEN},
    ]
    bad: list[Any] = [
        {"key": key("busy"), "happened": 1, **SEEN},
        {"key": key("nowhere"), "happened": 1, **SEEN},
        {"key": key("late"), "not_happened": True, "fence": 1, **SEEN},
        {"key": key("c"), "not_happened": True, "run": True, **SEEN},
        {"key": key("d"), "happened": 1, "not_happened": True, **SEEN},
        {"key": key("d"), "not_happened": False, **SEEN},
        {"key": key("d"), "happened": 1, "evidense": "x"},
        {"key": key("d"), "happened": 1, "by": "ann"},
        {"key": key("a"), "not_happened": True, **SEEN},
        {"key": "\0", "happened": 1, **SEEN},
        [1],
        b'{"key": \xff}\n',
        b"[" * 100_000 + b"\n",
        b'{"happened": NaN}\n',
        b'{"happened": 1e999}\n',
        b'{"key": "%s", "happened": 1, "happened": 2}\n' % key("d").encode(),
    ]
    file = decisions(tmp_path, *bad[:2], b"\n", *good, *bad[2:])
    done = idem("resolve", "--from", file, "--yes", "--json")
    assert done.exit_code == 1
    *lines, summary = rows(done.stdout)
    assert summary["summary"] == {
        "settled": 2,
        "already": 0,
        "refused": 3,
        "not_possible": 1,
        "not_published": 0,
        "invalid": 12,
    }
    assert [line["line"] for line in lines] == [1, 2, *range(4, 20)]  # line 3 is empty
    assert "its record holds no call" in next(
        line["why"] for line in lines if line["verdict"] == "not_possible"
    )
    assert [line["line"] for line in lines if line["verdict"] == "settled"] == [4, 5]
    assert all(line["why"] for line in lines if line["verdict"] != "settled")
    assert "'evidence'" in next(line["why"] for line in lines if "evidense" in line["why"])
    assert ["too large" in lines[-2]["why"], "given twice" in lines[-1]["why"]] == [True, True]
    states = [state(ledger, customer) for customer in ("a", "b", "c", "d", "late", "busy")]
    assert states == ["succeeded", "released", *["in_doubt"] * 3, "running"]
    assert send_invoice.apply(("a", 7)).get() == "inv-a"
    entry = ledger.get(key("a"))
    assert entry is not None
    assert (entry.record.notes[-1].by, entry.record.notes[-1].evidence) == tuple(SEEN.values())

    # Without --json: the lines that were not carried out, and why. A second run decides nothing twice.
    again = idem("resolve", "--from", file, "--yes")
    assert again.exit_code == 1
    assert "line 4:" not in again.stdout
    assert "line 1: refused:" in again.stdout
    assert "2 settled so before, 3 refused, 1 not possible, 12 not understood." in again.stdout


def test_what_did_not_happen_runs_at_once_from_its_record(
    idem: Idem, app: Celery, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file or a key can be given. A call that the broker did not take is published by a second run."""
    for customer in ("a", "b", "gone"):
        in_doubt(ledger, key(customer), call=message(customer, 7, task_id=f"id-{customer}", queue="again"))
    file = decisions(tmp_path, *({"key": key(c), "not_happened": True, "run": True, **SEEN} for c in "ab"))
    with monkeypatch.context() as broken:
        broken.setattr(app, "producer_or_acquire", None)
        away = idem("resolve", "--from", file, "--yes")
    assert away.exit_code == 1
    assert "2 decided and not published." in away.stdout
    assert "2 settled so before." in idem("resolve", "--from", file, "--yes").stdout
    words = ("--not-happened", "--run", "--evidence", "not there", "--yes")
    assert idem("resolve", key("gone"), *words).exit_code == 0
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue("again")
        published = [queue.get(timeout=5) for _ in range(3)]
    assert {message.headers["id"]: message.payload[0] for message in published} == {
        f"id-{customer}": [customer, 7] for customer in ("a", "b", "gone")
    }
    assert {state(ledger, customer) for customer in ("a", "b", "gone")} == {"released"}


def test_a_dry_run_changes_nothing(idem: Idem, ledger: Ledger, tmp_path: Path) -> None:
    in_doubt(ledger, key("a"))
    succeeded(ledger, key("b"))
    file = decisions(tmp_path, *({"key": key(c), "happened": 1} for c in "ab"))
    dry = idem("resolve", "--from", file, "--evidence", "seen", "--dry-run")
    assert dry.exit_code == 1
    assert "1 settled, 1 refused. Nothing was changed." in dry.stdout
    assert idem("resolve", key("a"), "--happened", "1", "--evidence", "x", "--dry-run").exit_code == 0
    assert state(ledger, "a") == "in_doubt"
    refused = idem("resolve", "--from", file, "--evidence", "seen", input="n\n")
    assert "2 intents will be settled" in refused.output
    assert "Nothing was changed" in refused.output
    assert state(ledger, "a") == "in_doubt"


def test_a_value_that_is_too_large_is_said_not_to_reach_its_callers(
    idem: Idem, ledger: Ledger, tmp_path: Path
) -> None:
    for customer in ("a", "b"):
        in_doubt(ledger, key(customer))
    file = decisions(tmp_path, {"key": key("a"), "happened": "x" * (1 << 20), **SEEN})
    for words in (("--dry-run",), ("--yes",)):
        done = idem("resolve", "--from", file, *words)
        assert done.exit_code == 0
        assert "line 1: settled: callers learn that it happened, and do not get the value" in done.stdout
        assert "more than idem_max_result_bytes" in done.stdout
    assert state(ledger, "a") == "succeeded"
    words = ("--happened", json.dumps("x" * (1 << 20)), "--evidence", "seen", "--yes")
    assert "do not get the value" in idem("resolve", key("b"), *words).stdout


def test_what_list_prints_is_a_file_once_a_decision_is_added(
    idem: Idem, ledger: Ledger, tmp_path: Path
) -> None:
    """The line has the fence: old evidence does not decide an intent that was claimed again since."""
    for customer in ("a", "b"):
        in_doubt(ledger, key(customer))
    listed = rows(idem("list", "--json", "--state", "in_doubt").output)
    ledger.resolve(key("b"), NotHappened(), by="bob")
    in_doubt(ledger, key("b"))
    file = decisions(tmp_path, *({**row, "not_happened": True, "evidence": "not there"} for row in listed))
    done = idem("resolve", "--from", "-", "--yes", input=Path(file).read_text())
    assert "1 settled, 1 refused" in done.stdout
    assert "changed since you looked" in done.stdout
    assert (state(ledger, "a"), state(ledger, "b")) == ("released", "in_doubt")


def test_a_store_that_is_away_ends_it(
    idem: Idem, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        in_doubt(ledger, key(f"c{n}"))
    read = ledger.store.read

    def away(name: str) -> Any:
        if name.endswith(key("c1")):
            raise StoreError("the store is away")
        return read(name)

    monkeypatch.setattr(ledger.store, "read", away)
    file = decisions(tmp_path, *({"key": key(f"c{n}"), "happened": n, **SEEN} for n in range(3)))
    ended = idem("resolve", "--from", file, "--yes")
    assert ended.exit_code == 1
    assert "the store is away 1 settled. Run it again to go on." in ended.stderr
    monkeypatch.undo()
    assert idem("resolve", "--from", file, "--yes").exit_code == 0


def test_progress_and_an_early_stop(
    idem: Idem, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        in_doubt(ledger, key(f"c{n}"))
    monkeypatch.setattr(reading, "SHOW_EVERY", 0.0)
    monkeypatch.setattr(reading, "shown", lambda: True)

    def tick(self: reading.Progress) -> None:
        ticked(self)
        if self.count == 2:
            raise KeyboardInterrupt

    ticked = reading.Progress.tick
    file = decisions(tmp_path, *({"key": key(f"c{n}"), "happened": n, **SEEN} for n in range(3)))
    monkeypatch.setattr(reading.Progress, "tick", tick)
    stopped = idem("resolve", "--from", file, "--yes")
    assert stopped.exit_code == 3
    assert "2 of 3 decided" in stopped.stderr
    assert "1 settled" in stopped.stdout
    monkeypatch.setattr(reading.Progress, "tick", ticked)
    again = idem("resolve", "--from", file, "--yes")
    assert again.exit_code == 0
    assert {state(ledger, f"c{n}") for n in range(3)} == {"succeeded"}


def test_several_keys_in_one_command(idem: Idem, ledger: Ledger) -> None:
    for customer in ("a", "b", "c"):
        in_doubt(ledger, key(customer))
    words = ("--not-happened", "--evidence", "not there", "--by", "ann")
    assert idem("resolve", key("a"), "nowhere", *words, "--yes").exit_code == 1
    assert state(ledger, "a") == "in_doubt"  # one of the keys does not exist, so nothing was decided
    refused = idem("resolve", key("a"), key("b"), *words, input="n\n")
    assert "2 intents: each will be released" in refused.output
    assert idem("resolve", key("a"), key("b"), key("a"), *words, "--yes").exit_code == 0
    assert [state(ledger, customer) for customer in "abc"] == ["released", "released", "in_doubt"]
    assert idem("resolve", key("a"), key("b"), *words, "--fence", "1", "--yes").exit_code == 2
    assert idem("resolve", *words, "--yes").exit_code == 2


@pytest.mark.redis
@pytest.mark.timeout(300)
def test_thousands_by_page_and_by_file(
    app: Celery, idem: Idem, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5,000 intents are decided from a file, and the same again on a page of the inbox.

    The test counts the exchanges with Redis, because the time depends on the machine.
    """
    monkeypatch.setattr("celery_idem.adapters.inbox.PATIENCE", 240.0)
    url = urlsplit(redis_url)
    copy_url = url._replace(path="/1").geturl()
    with redis_py.Redis.from_url(redis_url) as client, redis_py.Redis.from_url(copy_url) as other:
        other.flushdb()
        use_store(app, redis_url)
        ledger = Ledger.from_app(app)
        in_doubt(ledger, key("c0"))
        names = [f"{ledger.namespace}:{key(f'c{n}')}" for n in range(MANY)]
        with client.pipeline(transaction=False) as copies:
            for name in names:
                for database in (0, 1):
                    copies.copy(names[0], name, destination_db=database)
            copies.execute(raise_on_error=False)  # the copy of the first record to itself fails
        assert idem("reindex").exit_code == 0

        def exchanges() -> int:
            return int(client.info("stats")["total_reads_processed"])

        before = exchanges()
        lines = ({"key": key(f"c{n}"), "not_happened": True, **SEEN} for n in range(MANY))
        done = idem("resolve", "--from", decisions(tmp_path, *lines), "--yes")
        assert done.stdout == "5,000 settled.\n"
        assert exchanges() - before <= 2 * MANY + 500  # one read and one write for each intent
        assert Counter(entry.state for entry in ledger.list()) == {"released": MANY}

        use_store(app, copy_url)
        assert idem("reindex").exit_code == 0
        requests: list[str] = []
        with TestClient(inbox(app, token=TOKEN)) as browser:
            browser.event_hooks["request"].append(lambda request: requests.append(request.method))
            form = {**hidden(browser.get("/sign-in")), "name": "ann", "token": TOKEN}
            page = browser.post("/sign-in", data=form)
            assert "5,000 intents wait" in page.text
            before = exchanges()
            given = {"decision": "happened", "result": "1", "evidence": "seen", "number": "5,000"}
            requests.clear()
            done = browser.post("/resolve-all", data={**hidden(page), **given})
        assert "5,000 intents are succeeded now" in done.text
        assert requests == ["POST"]
        assert exchanges() - before <= 2 * MANY + 500
        assert Counter(entry.state for entry in Ledger.from_app(app).list()) == {"succeeded": MANY}
        other.flushdb()
