"""The command line: its output, its exit statuses, and what it changes."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery
from rich.console import Console

from celery_idem import Ledger, NotHappened
from celery_idem.cli import reading, records, screen
from celery_idem.core.model import Outcome, State
from celery_idem.core.results import Codec
from celery_idem.core.sealing import Seal
from celery_idem.engine import events
from celery_idem.engine.entries import WAITING
from tests.operators.conftest import Idem, use_store
from tests.operators.forms import hidden
from tests.operators.intents import claimed, in_doubt, message, succeeded
from tests.operators.shop import app as shop
from tests.operators.shop import remind, send_invoice
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]


def rows(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines()]


def key(customer: str) -> str:
    return send_invoice.intent_key(customer, 7)


# --- reading ---------------------------------------------------------------------------


def test_list_filters_by_state_and_task(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    succeeded(ledger, key("b"))
    claimed(ledger, key("c"))
    claimed(ledger, key("d"), lease=0)
    succeeded(ledger, remind.intent_key("b"))

    assert len(rows(idem("list", "--json").output)) == 5
    assert [row["key"] for row in rows(idem("list", "--json", "--state", "in_doubt").output)] == [key("a")]
    assert [row["key"] for row in rows(idem("list", "--json", "--state", "lapsed").output)] == [key("d")]
    assert len(rows(idem("list", "--json", "--task", "shop.remind").output)) == 1
    assert idem("list", "--older-than", "60").output == "No such intents.\n"


def test_list_shows_people_the_oldest_and_counts_the_rest(idem: Idem, ledger: Ledger) -> None:
    for n in range(6):
        in_doubt(ledger, key(f"c{n}"))
    output = idem("list", "--limit", "2").output
    assert [line.split()[2] for line in output.splitlines()[:2]] == [key("c0"), key("c1")]
    assert "Page 1 of 3, 6 intents" in output
    last = idem("list", "--limit", "2", "--page", "3").output
    assert [line.split()[2] for line in last.splitlines()[:2]] == [key("c4"), key("c5")]


def test_list_filters_by_scope_reason_and_age(idem: Idem, ledger: Ledger) -> None:
    for scope in ("acme", "other", None):
        send_invoice.apply(("a", 7), scope=scope)
    in_doubt(ledger, key("b"), "the body was interrupted by ReadTimeout")
    in_doubt(ledger, key("c"))

    def listed(*words: str) -> list[str]:
        return [row["key"] for row in rows(idem("list", "--json", *words).output)]

    assert listed("--scope", "acme") == [send_invoice.intent_key("a", 7, scope="acme")]
    assert listed("--reason", "readtimeout") == [key("b")]
    assert listed("--since", "1h", "--state", "waiting", "--reason", "worker") == [key("c")]
    assert listed("--since", "2100-01-01T00:00Z") == listed("--older-than", "1m") == []
    assert len(listed("--since", "2020-01-01")) == 5


def test_a_reading_that_was_stopped_says_that_it_is_not_all(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    for words in (("stats",), ("list", "--state", "in_doubt"), ("list", "--json")):
        stopped = idem(*words, "--within", "0")
        assert stopped.exit_code == 3
        assert "Stopped after 0 records. There are more" in stopped.stderr
        assert idem(*words, "--within", "60").exit_code == 0
    assert (
        idem("list", "--state", "in_doubt", "--within", "0").stdout == "No such intents among those read.\n"
    )


def test_who_waits_sees_how_far_it_is_and_may_stop_it(
    idem: Idem, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(3):
        in_doubt(ledger, key(f"c{n}"))
    monkeypatch.setattr(reading, "SHOW_EVERY", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)

    def read(tick: Any) -> Any:
        for n, entry in enumerate(ledger.list(tick=tick)):
            if n == 2:
                raise KeyboardInterrupt
            yield entry

    shown = reading.Reading(read, None)
    assert len(list(shown)) == 2
    assert shown.stopped
    assert "2 read; Ctrl-C stops here" in capsys.readouterr().err


def test_show_takes_the_beginning_of_a_key(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"), "the body was interrupted by TimeoutError")
    shown = idem("show", key("a")[:-20]).output
    assert key("a") in shown
    assert "TimeoutError" in shown
    assert "--not-happened" in shown  # what to do next
    in_doubt(ledger, key("b"))
    ambiguous = idem("show", "shop.send_invoice:")
    assert ambiguous.exit_code == 1
    assert "Give more of the key" in ambiguous.output


def test_show_gives_commands_that_can_be_copied(
    idem: Idem, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_doubt(ledger, key("a"))
    typed = ["celery", "-b", "redis://:s3cret@host", "-A", "our shop", "idem", "show", key("a")]
    monkeypatch.setattr("sys.argv", typed)
    shown = idem("show", key("a")).output
    assert f"celery -A 'our shop' idem resolve '{key('a')}'" in shown
    assert "s3cret" not in shown


def test_show_says_where_it_looked(idem: Idem) -> None:
    missing = idem("show", key("a"))
    assert missing.exit_code == 1
    assert "memory://" in missing.output


def test_a_task_with_secrets_does_not_show_its_result(idem: Idem, ledger: Ledger) -> None:
    succeeded(ledger, remind.intent_key("a"), "with s3cret")
    for words in (("show", remind.intent_key("a")), ("list", "--json")):
        output = idem(*words).output
        assert "s3cret" not in output
        assert "not shown" in output or words[0] == "list"


def test_stats_counts_by_task_and_state(idem: Idem, ledger: Ledger) -> None:
    for n in range(3):
        in_doubt(ledger, key(f"c{n}"))
    succeeded(ledger, remind.intent_key("a"))
    counted = {
        (row["task"], row["state"]): row["intents"] for row in json.loads(idem("stats", "--json").output)
    }
    assert counted == {("shop.send_invoice", "in_doubt"): 3, ("shop.remind", "succeeded"): 1}
    assert "3 of them wait" in idem("stats").output


def test_key_says_what_makes_two_calls_differ(idem: Idem) -> None:
    same = json.loads(
        idem(
            "key", "shop.send_invoice", '{"customer_id": "a", "invoice_id": 7}', '["a", 7.0, 500]', "--json"
        ).output
    )
    assert same["same"]
    assert same["calls"][0]["key"] == key("a")
    other = idem("key", "shop.send_invoice", '["a", 7]', '["a", 8]').output
    assert "they differ in invoice_id" in other
    scoped = idem("key", "shop.send_invoice", '["a", 7]', '["a", 7]', "--scope", "x", "--scope", "y").output
    assert "they differ in scope" in scoped
    refused = idem("key", "shop.send_invoice", '["a", 7, 500]', '["a", 7, 600]').output
    assert "another value of cents" in refused


def left(idem: Idem, ledger: Ledger) -> Any:
    in_doubt(ledger, remind.intent_key("a"))
    return idem("reconcile", "--yes")


def not_resealed(idem: Idem, ledger: Ledger) -> Any:
    claimed(ledger, key("a"), call=b"a call in clear")
    send_invoice.guard.ledger.codec = Codec(seal=Seal([base64.b64encode(bytes(32)).decode()]))
    return idem("reseal", "--yes")


def unsafe(idem: Idem, ledger: Ledger) -> Any:
    use_store(shop, "redis://127.0.0.1:1/0")  # does not answer
    return idem("doctor")


def listed(idem: Idem, ledger: Ledger) -> Any:
    in_doubt(ledger, key("a"))
    return idem("list", "--state", "waiting")


def interrupted(idem: Idem, ledger: Ledger) -> Any:
    def tick(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.Progress, "tick", tick)
        return idem("resolve", "--from", "-", "--yes", input="{}")


NONE = ("--not-happened", "--evidence", "x", "--yes")

STATUSES: dict[tuple[int, str], Any] = {
    (0, "every command"): lambda idem, ledger: idem("stats"),
    (0, "list"): listed,
    (1, "list"): lambda idem, ledger: idem("list", "--state", "waiting"),
    (1, "show"): lambda idem, ledger: idem("show", key("a")),
    (1, "resolve"): lambda idem, ledger: idem("resolve", key("a"), *NONE),
    (1, "resolve --from"): lambda idem, ledger: idem("resolve", "--from", "-", "--yes", input="{}"),
    (1, "forget"): lambda idem, ledger: idem("forget", key("a"), "--yes"),
    (1, "retry"): lambda idem, ledger: idem("retry", key("a"), "--yes"),
    (1, "cancel"): lambda idem, ledger: idem("cancel", key("a"), "--yes"),
    (1, "reconcile"): left,
    (1, "reseal"): not_resealed,
    (1, "doctor"): unsafe,
    (1, "every command"): lambda idem, ledger: idem("purge", input="n\n"),
    (2, "every command"): lambda idem, ledger: idem("list", "--nonsense"),
    (3, "list"): lambda idem, ledger: idem("list", "--within", "0"),
    (3, "stats"): lambda idem, ledger: idem("stats", "--within", "0"),
    (3, "decisions"): lambda idem, ledger: idem("decisions", "--within", "0"),
    (3, "reseal"): lambda idem, ledger: idem("reseal", "--within", "0"),
    (3, "resolve --from"): interrupted,
}


def test_every_exit_status_of_the_page_is_known_here() -> None:
    rows = re.findall(
        r"^\| (\d) \| `?([\w -]+?)`? \|", (ROOT / "docs/reference/cli.md").read_text(), re.MULTILINE
    )
    assert [(int(status), command) for status, command in rows] == list(STATUSES)


@pytest.mark.parametrize(("status", "command"), STATUSES)
def test_the_exit_status_is_as_documented(idem: Idem, ledger: Ledger, status: int, command: str) -> None:
    if status == 3:
        in_doubt(ledger, key("a"))
    done = STATUSES[status, command](idem, ledger)
    assert done.exit_code == status, done.output


@pytest.mark.parametrize("found", [True, False])
def test_list_as_json_has_the_same_status(idem: Idem, ledger: Ledger, found: bool) -> None:
    if found:
        in_doubt(ledger, key("a"))
    assert idem("list", "--state", "waiting", "--json").exit_code == (0 if found else 1)


# --- changing --------------------------------------------------------------------------


def test_resolve_happened_gives_every_caller_the_result(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    words = ("resolve", key("a"), "--happened", '"inv-9"', "--by", "ann", "--evidence", "saw it in billing")
    assert idem(*words, "--yes").exit_code == 0
    assert send_invoice.apply(("a", 7)).get() == "inv-9"
    entry = ledger.get(key("a"))
    assert entry is not None
    assert (entry.record.notes[-1].by, entry.record.notes[-1].evidence) == ("ann", "saw it in billing")


def test_old_evidence_says_nothing_of_a_later_attempt(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    seen = json.loads(idem("show", key("a"), "--json").output)["fence"]
    assert f"--fence {seen} --not-happened" in idem("show", key("a")).output
    ledger.resolve(key("a"), NotHappened(), by="bob")
    in_doubt(ledger, key("a"))  # claimed again, and in doubt again
    words = ("resolve", key("a"), "--not-happened", "--evidence", "nothing there", "--yes")
    refused = idem(*words, "--fence", str(seen))
    assert refused.exit_code == 1
    assert "changed since you looked" in refused.output
    assert idem(*words).exit_code == 0


def test_resolve_not_happened_lets_the_next_delivery_run(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    assert idem("resolve", key("a"), "--not-happened", "--evidence", "nothing there", "--yes").exit_code == 0
    assert send_invoice.apply(("a", 7)).get() == "inv-a-7"


def test_nothing_is_changed_without_a_yes(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    for words in (
        ("resolve", key("a"), "--not-happened", "--evidence", "x"),
        ("forget", key("a")),
        ("reconcile",),
        ("purge",),
    ):
        for answer in ("n\n", ""):
            refused = idem(*words, input=answer)
            assert refused.exit_code == 1
            assert "Nothing was changed" in refused.output
    entry = ledger.get(key("a"))
    assert entry is not None
    assert entry.state == "in_doubt"


def test_half_a_surrogate_pair_is_shown(idem: Idem, ledger: Ledger) -> None:
    """A text may have one: half of a cut emoji, or a file name that is not UTF-8."""
    succeeded(ledger, key("a"), "cut \ud83d")
    for words in (["list"], ["show", key("a")]):
        for more in ([], ["--json"]):
            shown = idem(*words, *more)
            assert shown.exit_code == 0, shown.output
    assert json.loads(idem("show", key("a"), "--json").output)["result"].isascii() is False
    assert "cut \\ud83d" in idem("show", key("a")).output


@pytest.mark.parametrize("result", ["NaN", "1e999", '{"a": 1, "a": 2}', "[" * 100_000])
def test_resolve_takes_only_what_json_can_say(idem: Idem, ledger: Ledger, result: str) -> None:
    in_doubt(ledger, key("a"))
    refused = idem("resolve", key("a"), "--happened", result, "--evidence", "x", "--yes")
    assert (refused.exit_code, "takes JSON" in refused.output) == (2, True)
    assert len(refused.output) < 1500
    entry = ledger.get(key("a"))
    assert entry is not None
    assert entry.state == "in_doubt"


def test_resolve_wants_evidence_and_json(idem: Idem, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    assert idem("resolve", key("a"), "--not-happened", "--evidence", " ", "--yes").exit_code == 2
    wrong = idem("resolve", key("a"), "--happened", "inv-9", "--evidence", "x", "--yes")
    assert wrong.exit_code == 2
    assert "--happened '\"inv-9\"'" in wrong.output
    assert idem("resolve", key("a"), "--evidence", "x", "--yes").exit_code == 2


@pytest.mark.parametrize("settle", [succeeded, claimed])
def test_only_what_is_in_doubt_is_resolved(idem: Idem, ledger: Ledger, settle: Any) -> None:
    settle(ledger, key("a"))
    refused = idem("resolve", key("a"), "--not-happened", "--evidence", "x", "--yes")
    assert refused.exit_code == 1
    assert "not in doubt" in refused.output


def test_forget_lets_it_happen_again(idem: Idem, ledger: Ledger) -> None:
    succeeded(ledger, key("a"))
    heard: list[events.Event] = []
    stop = events.listen(heard.append, here=True)
    assert idem("forget", key("a"), "--yes", "--by", "ann").exit_code == 0
    stop()
    assert ledger.get(key("a")) is None
    assert [(event.kind, event.details["by"]) for event in heard] == [("forgotten", "ann")]


def test_forget_many_takes_a_state_and_the_number(idem: Idem, ledger: Ledger) -> None:
    for n in range(3):
        claimed(ledger, key(f"f{n}")).settle(Outcome(False, None, "it failed"), 0.0)
    succeeded(ledger, key("fine"))
    words = ("forget", "--state", "failed", "--task", "shop.send_invoice", "--since", "1h")
    refused = idem(*words, input="y\n")
    assert refused.exit_code == 1
    assert "3 intents" in refused.output
    assert len(list(ledger.list())) == 4
    assert idem(*words, input="3\n").stdout == "3 intents forgotten.\n"
    assert [entry.key for entry in ledger.list()] == [key("fine")]


def test_forget_is_about_the_attempt_that_was_seen(
    idem: Idem, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(ledger, key("a"))

    def confirm(*_: Any) -> None:
        ledger.forget(key("a"))
        claimed(ledger, key("a"))

    monkeypatch.setattr("celery_idem.cli.screen.Screen.confirm", confirm)
    refused = idem("forget", key("a"))
    assert refused.exit_code == 1
    assert "changed since you looked" in refused.output
    entry = ledger.get(key("a"))
    assert entry is not None
    assert entry.state == "running"


# --- in bulk ---------------------------------------------------------------------------


def arguments_file(tmp_path: Path, *customers: str) -> str:
    path = tmp_path / "arguments.jsonl"
    path.write_text("".join(json.dumps({"key": key(c), "args": [c, 7]}) + "\n" for c in customers))
    return str(path)


def test_reconcile_asks_and_settles(idem: Idem, ledger: Ledger, billing_knows: Any, tmp_path: Path) -> None:
    billing_knows(a="inv-from-billing")
    for customer in ("a", "b", "nobody-knows", "no-arguments"):
        in_doubt(ledger, key(customer))
    in_doubt(ledger, remind.intent_key("a"))  # has no reconcile
    given = arguments_file(tmp_path, "a", "b", "nobody-knows")

    dry = rows(idem("reconcile", "--json", "--dry-run", "--arguments", given).output)
    assert dry[-1]["summary"] == {"happened": 1, "not_happened": 1, "unknown": 1, "skipped": 2}
    assert sum(row["state"] == "in_doubt" for row in rows(idem("list", "--json").output)) == 5

    done = idem("reconcile", "--yes", "--arguments", given)
    assert done.exit_code == 1  # something is left for a person
    assert (
        sum(line.strip().startswith("1  not asked: ") for line in done.stdout.splitlines()) == 2
    )  # by reason
    assert key("no-arguments") not in done.stdout
    states = {row["key"]: row["state"] for row in rows(idem("list", "--json").output)}
    assert states[key("a")] == "succeeded"
    assert states[key("b")] == "released"
    assert states[key("nobody-knows")] == states[key("no-arguments")] == "in_doubt"
    assert send_invoice.apply(("a", 7)).get() == "inv-from-billing"


def test_reconcile_does_not_ask_about_another_call(
    idem: Idem, app: Celery, ledger: Ledger, billing_knows: Any, tmp_path: Path
) -> None:
    """Arguments of another call are refused: billing does not know customer z and would answer "did not happen"."""
    billing_knows(a="inv")
    digester = app.tasks["shop.send_invoice"].guard.digester
    claimed(ledger, key("a"), lease=0, digests=digester.of(("a", 7), {"note": "please"}))
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps({"key": key("a"), "args": ["z", 7]}))
    (row, _) = rows(idem("reconcile", "--yes", "--json", "--arguments", str(path)).output)
    assert row["verdict"] == "skipped"
    assert "another call" in row["why"]
    path.write_text(json.dumps({"key": key("a"), "args": ["a", 7], "kwargs": {"note": "reworded"}}))
    (row, _) = rows(idem("reconcile", "--yes", "--json", "--arguments", str(path)).output)
    assert row["verdict"] == "happened"


def test_reconcile_goes_on_where_it_stopped(
    idem: Idem, ledger: Ledger, billing_knows: Any, tmp_path: Path
) -> None:
    customers = [f"c{n}" for n in range(10)]
    billing_knows(**dict.fromkeys(customers, "inv"))
    for customer in customers:
        in_doubt(ledger, key(customer))
    given = arguments_file(tmp_path, *customers)
    for settled in (4, 8, 10):
        idem("reconcile", "--yes", "--limit", "4", "--arguments", given)
        assert len(rows(idem("list", "--json", "--state", "succeeded").output)) == settled


def test_reconcile_finds_arguments_in_the_result_backend(
    idem: Idem, app: Celery, ledger: Ledger, billing_knows: Any
) -> None:
    billing_knows(a="inv")
    in_doubt(ledger, key("a"))
    entry = ledger.get(key("a"))
    assert entry is not None
    app.conf.result_extended = True
    try:
        from celery.app.task import Context

        request = Context(id=entry.record.task_id, args=["a", 7], kwargs={}, task="shop.send_invoice")
        app.backend.mark_as_failure(entry.record.task_id, RuntimeError("in doubt"), request=request)
        assert idem("reconcile", "--yes").exit_code == 0
    finally:
        app.conf.result_extended = False
    assert send_invoice.apply(("a", 7)).get() == "inv"


def test_show_says_what_can_be_done_in_each_state(idem: Idem, ledger: Ledger) -> None:
    assert {*records._ADVICE, *WAITING} == {*(state.name.lower() for state in State), "lapsed"}
    send_invoice.submit("a", 7)
    assert "It has not begun" in idem("show", key("a")).output
    claimed(ledger, key("b")).settle(Outcome(False, b"j1"), 0.0)
    shown = idem("show", key("b")).output
    assert f"idem retry '{key('b')}'" in shown
    assert "happen again" not in shown


# --- pictures ----------------------------------------------------------------------------


def test_pictures_of_the_command_line(idem: Idem, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures can be made. `make pictures` sets IDEM_PICTURES=1, which writes them to the documentation."""
    for n in range(4):
        known = {"call": message(f"cus-{n}", 7), "place": f"celery@web-{n % 2 + 1}, process {20411 + n}"}
        in_doubt(ledger, key(f"cus-{n}"), "the body was interrupted by ReadTimeout", **known)
    claimed(ledger, key("silent"), lease=0, call=message("silent", 7), place="celery@web-3, process 118")
    monkeypatch.setattr("sys.argv", ["celery", "-A", "shop", "idem"])
    for name, words in (("list", ("list", "--state", "waiting")), ("show", ("show", key("cus-0")))):
        console = Console(record=True, width=130, file=io.StringIO(), force_terminal=True, highlight=False)
        monkeypatch.setattr(screen.Screen, "console", console)
        assert idem(*words).exit_code == 0
        svg = console.export_svg(title=shlex.join(["celery", "-A", "shop", "idem", *words]), unique_id=name)
        svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)  # they load from another site
        assert key("cus-0") in svg
        if os.environ.get("IDEM_PICTURES") == "1":
            (ROOT / "docs" / "img" / f"cli-{name}.svg").write_text(svg)


# --- without rich, and as celery runs it -----------------------------------------------


def test_without_rich_json_works_and_the_rest_names_the_extra(
    idem: Idem, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeeded(ledger, key("a"))
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert len(rows(idem("list", "--json").output)) == 1
    refused = idem("forget", key("a"), "--yes")
    assert refused.exit_code == 1
    assert "celery_idem[cli]" in refused.output
    assert ledger.get(key("a")) is not None


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_inbox_listens_by_ipv6(idem: Idem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **given: given["sockets"][0].close())
    served = idem("inbox", "--port", "0", "--address", "::1", "--json")
    assert json.loads(served.output)["url"].startswith("http://[::1]:")


def test_the_inbox_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-m", "celery", "-A", "tests.operators.shop", "idem", "inbox", "--port", "0"]
    monkeypatch.delenv("IDEM_INBOX_TOKEN", raising=False)
    with subprocess.Popen([*words, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as served:
        try:
            assert served.stdout is not None
            said = json.loads(served.stdout.readline())
            client = httpx.Client(base_url=said["url"], follow_redirects=True)
            form = hidden(client.get("/sign-in"))
            client.post("/sign-in", data={**form, "name": "ann", "token": said["token"]})
            wait_for(lambda: "0 intents wait" in client.get("/").text, message="what waits")
        finally:
            served.send_signal(signal.SIGINT)
        assert served.wait(60) == 0


def test_celery_finds_the_command() -> None:
    words = [sys.executable, "-m", "celery", "-A", "tests.operators.shop", "idem", "stats", "--json"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
