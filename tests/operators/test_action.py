"""Operators see which action an intent is, run it, answer its caller or cancel it, with a worker and a Redis."""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import Cancelled, Ledger, OutcomeUnknown
from celery_idem.adapters.inbox import inbox
from celery_idem.integration import messages
from tests.conftest import running
from tests.operators import scene
from tests.operators.conftest import Idem, command_line
from tests.operators.forms import form_for, hidden
from tests.operators.test_alerts import alerts, fired
from tests.support.effects import Effects
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

pytestmark = pytest.mark.redis

TOKEN = "a token of the right length"
SEEN = ("--by", "ann", "--evidence", "the list of 14:03", "--yes")


class Scene(NamedTuple):
    app: Celery
    idem: Idem
    ledger: Ledger
    effects: Effects
    worker: CeleryWorker

    def call(self, name: str, *args: Any, **options: Any) -> Any:
        return self.app.tasks[f"scene.{name}"].apply_async(args, **options)

    def key(self, name: str, *args: Any) -> str:
        key: str = self.app.tasks[f"scene.{name}"].intent_key(*args)
        return key

    def state(self, key: str) -> str:
        entry = self.ledger.get(key)
        return "" if entry is None else entry.state

    def answered(self, task_id: str) -> Any:
        """Wait for the result with a new result object: an old one keeps the first final state that it read."""
        wait_for(lambda: self.app.AsyncResult(task_id).successful(), message="the result")
        return self.app.AsyncResult(task_id).result

    def wait(self, key: str, state: str) -> None:
        wait_for(lambda: self.state(key) == state, message=lambda: f"{state} of {key}: {self.state(key)}")


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    with running(lambda: RedisServer(folder / "redis")) as server:
        env = {
            "IDEM_TEST_REDIS": server.url,
            "IDEM_TEST_QUEUE": "scene",
            "IDEM_TEST_EFFECTS": str(folder / "effects"),
        }
        app = scene.make(server.url, "scene")
        worker = CeleryWorker("tests.operators.scene:app", folder, env=env, concurrency=4)
        try:
            yield Scene(app, command_line(app), Ledger.from_app(app), Effects(folder / "effects"), worker)
        finally:
            worker.kill()
            app.close()


def test_an_operator_sees_which_action_it_is_and_its_caller_gets_what_happened(on: Scene) -> None:
    link = on.app.tasks["scene.after"].s("told")
    result = on.call("send_invoice", "ada", 7, link=link)
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    key = on.key("send_invoice", "ada", 7)
    on.wait(key, "in_doubt")

    says = "invoice 7 for customer ada, 500 cents"
    listed = on.idem("list", "--state", "in_doubt").output
    assert says in listed
    assert on.worker.name in listed
    shown = on.idem("show", key).output
    for line in (says, "customer_id = 'ada'", "invoice_id = 7", "cents = 500", on.worker.name, "began"):
        assert line in shown, shown
    form = json.loads(on.idem("show", key, "--json").output)
    assert form["intent"] == {"customer_id": "'ada'", "invoice_id": "7"}
    assert form["place"].startswith(on.worker.name)
    assert f"action='{says}'" in on.worker.log_text()  # the event, in the log

    assert on.idem("resolve", key, "--happened", '"inv-9"', *SEEN).exit_code == 0
    assert on.answered(result.id) == "inv-9"
    on.effects.wait("told inv-9")
    for words in (("show", key), ("decisions",)):  # the decided action is still named
        assert says in on.idem(*words).output
    assert (on.effects.count("told inv-9"), on.effects.count("ada")) == (1, 0)


def test_a_caller_is_answered_by_a_second_try_where_the_first_ended_in_between(
    on: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = on.call("send_invoice", "bob", 7)
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    key = on.key("send_invoice", "bob", 7)
    on.wait(key, "in_doubt")
    words = ("resolve", key, "--happened", '"inv-3"', *SEEN)
    with monkeypatch.context() as broken:
        broken.setattr(messages, "publish", None)
        away = on.idem(*words)
    assert away.exit_code == 1
    assert "did not take its call" in away.output
    assert on.state(key) == "succeeded"
    assert on.idem(*words).exit_code == 0
    assert on.answered(result.id) == "inv-3"


def test_what_did_not_happen_runs_at_once(on: Scene) -> None:
    result = on.call("send_invoice", "cyd", 7, link=on.app.tasks["scene.after"].s("ran"))
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    key = on.key("send_invoice", "cyd", 7)
    on.wait(key, "in_doubt")
    assert on.idem("resolve", key, "--not-happened", "--run", *SEEN).exit_code == 0
    on.effects.wait("ran inv-cyd-7")
    assert on.answered(result.id) == "inv-cyd-7"
    assert (on.effects.count("cyd"), on.effects.count("ran inv-cyd-7")) == (1, 1)


def test_a_secret_is_nowhere_and_what_needs_it_says_so(on: Scene, caplog: pytest.LogCaptureFixture) -> None:
    result = on.call("pay", "eve", "s3cret-card", "n" * 5000)
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    key = on.key("pay", "eve")
    on.wait(key, "in_doubt")
    with caplog.at_level(logging.DEBUG):
        client = signed_in(on.app)
        pages = [client.get("/").text, client.get("/intent", params={"key": key}).text]
        shown = [on.idem("list").output, on.idem("list", "--json").output, on.idem("show", key).output]
        run = on.idem("resolve", key, "--not-happened", "--run", *SEEN)
    for text in (*pages, *shown):
        assert "pay for eve with (secret)" in text
        assert "n" * 300 not in text
    assert "secret values are not in the record" in run.output
    assert on.state(key) == "in_doubt"
    for text in (*pages, *shown, run.output, caplog.text, on.worker.log_text()):
        assert "s3cret" not in text


def signed_in(app: Celery) -> TestClient:
    client = TestClient(inbox(app, token=TOKEN))
    csrf = hidden(client.get("/sign-in"))["csrf"]
    client.post("/sign-in", data={"csrf": csrf, "name": "ann", "token": TOKEN})
    return client


def test_the_inbox_names_customer_and_invoice_runs_and_cancels(on: Scene) -> None:
    result = on.call("send_invoice", "fay", 7)
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    key = on.key("send_invoice", "fay", 7)
    on.wait(key, "in_doubt")
    client = signed_in(on.app)
    says = "invoice 7 for customer fay, 500 cents"
    for page in (client.get("/").text, client.get("/intent", params={"key": key}).text):
        assert says in page
        assert on.worker.name in page
    form = form_for(client, key)
    done = client.post(
        "/resolve", data={**form, "decision": "run", "evidence": "not in billing"}, follow_redirects=False
    )
    assert done.status_code == 303, done.text
    assert on.answered(result.id) == "inv-fay-7"

    waits = on.call("later", "inbox")
    key = on.key("later", "inbox")
    on.wait(key, "scheduled")
    form = form_for(client, key)
    assert client.post("/cancel", data=form).status_code == 400  # without a reason
    cancelled = client.post("/cancel", data={**form, "evidence": "ordered twice"})
    assert "cancelled by ann: ordered twice" in cancelled.text
    with pytest.raises(Cancelled, match="ordered twice"):
        waits.get(timeout=60)
    assert on.effects.count("inbox") == 0


def test_what_waits_for_its_retry_is_cancelled_and_its_caller_is_told(on: Scene) -> None:
    result = on.call("later", "report")
    key = on.key("later", "report")
    on.wait(key, "scheduled")
    done = on.idem("cancel", key, *SEEN)
    assert done.exit_code == 0
    assert "It will not run: cancelled by ann: the list of 14:03." in done.output
    with pytest.raises(Cancelled, match="cancelled by ann"):
        result.get(timeout=60)
    receipt = on.app.tasks["scene.later"].submit("report")
    assert (receipt.status, receipt.code, receipt.final) == ("failed", "cancelled", True)
    with pytest.raises(Cancelled):
        on.call("later", "report").get(timeout=60)
    assert on.effects.count("report") == 0
    assert on.idem("cancel", key, *SEEN).exit_code == 0  # a second cancellation changes nothing
    assert on.idem("forget", key, "--yes").exit_code == 0
    on.call("later", "report").get(timeout=60)
    assert on.effects.count("report") == 1


@pytest.mark.parametrize("heeds", [True, False])
def test_what_runs_is_asked_to_stop_and_its_end_is_what_counts(on: Scene, heeds: bool) -> None:
    what = f"long-{heeds}"
    result = on.call("long", what, heeds)
    on.effects.wait(f"begun {what}")
    key = on.key("long", what)
    asked = on.idem("cancel", key, *SEEN)
    assert asked.exit_code == 0
    assert asked.output.startswith("running")
    assert "is not known yet" in asked.output
    if heeds:
        with pytest.raises(Cancelled, match="cancelled by ann"):
            result.get(timeout=60)
        on.wait(key, "cancelled")
    else:
        assert result.get(timeout=60) == "done all the same"
        refused = on.idem("cancel", key, *SEEN)
        assert refused.exit_code == 1
        assert "succeeded already" in refused.output
    assert on.effects.count(what) == (0 if heeds else 1)


def test_what_is_in_doubt_or_not_there_is_not_cancelled(on: Scene) -> None:
    result = on.call("send_invoice", "dan", 7)
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    key = on.key("send_invoice", "dan", 7)
    on.wait(key, "in_doubt")
    refused = on.idem("cancel", key, *SEEN)
    assert refused.exit_code == 1
    assert "is not known, so it cannot be cancelled" in refused.output
    assert on.state(key) == "in_doubt"
    assert on.idem("cancel", on.key("send_invoice", "nobody", 7), *SEEN).exit_code == 1


# --- from an alert to a settled intent ---------------------------------------------------


def doubted(on: Scene, customer: str) -> Any:
    """Make a call that ends in doubt, and return its result object."""
    result = on.call("send_invoice", customer, 7)
    with pytest.raises(OutcomeUnknown):
        result.get(timeout=60)
    on.wait(on.key("send_invoice", customer, 7), "in_doubt")
    return result


def alarmed(on: Scene, folder: Path) -> str:
    """Let the alert fire on the exporter's sample, which then grows each minute. Return what the alert says to do."""
    scraped = on.idem("metrics", "--once").output
    oldest = re.findall(
        r'^(celery_idem_oldest_seconds\{[^}]*state="in_doubt"[^}]*\}) (\S+)$', scraped, re.MULTILINE
    )
    samples = [
        (series, f"{float(age):.0f}+60x30") for series, age in oldest if 'task="scene.send_invoice"' in series
    ]
    assert samples, scraped
    fired({"the night": (samples, 25, "IdemInDoubt")}, folder)
    says: str = alerts()["IdemInDoubt"]["annotations"]["what_to_do"]
    return says


def test_from_an_alert_to_a_settled_intent_in_three_commands(on: Scene, tmp_path: Path) -> None:
    result = doubted(on, "gus")
    command = re.match(r"celery -A proj idem ([^;]+);", alarmed(on, tmp_path))
    assert command
    listed = on.idem(*shlex.split(command[1])).output  # 1
    (line,) = [line for line in listed.splitlines() if "invoice 7 for customer gus" in line]
    key = re.search(r"scene\.send_invoice:\w+", line)
    assert key
    shown = on.idem("show", key[0]).output  # 2
    assert "customer_id = 'gus'" in shown
    # `show` proposes the command, with the fence. Billing has no such invoice.
    proposed = re.search(r"celery -A \S+ idem (resolve \S+) [^`\n]*(--fence \d+)", shown)
    assert proposed, shown
    words = [*shlex.split(proposed[1]), *proposed[2].split(), "--not-happened", "--run", *SEEN]
    assert on.idem(*words).exit_code == 0  # 3
    assert on.answered(result.id) == "inv-gus-7"
    assert on.state(key[0]) == "succeeded"
    assert on.effects.count("gus") == 1


def test_from_an_alert_to_a_settled_intent_in_four_clicks(on: Scene, tmp_path: Path) -> None:
    result = doubted(on, "hal")
    alarmed(on, tmp_path)
    client = TestClient(inbox(on.app, token=TOKEN))
    clicks: list[str] = []

    def click(request: Callable[..., Any], path: str, **given: Any) -> Any:
        clicks.append(path)
        page = request(path, **given)
        assert page.status_code == 200
        return page

    door = click(client.get, "/", headers={"accept": "text/html"})  # 1, redirected to the sign-in form
    signed = {**hidden(door), "name": "ann", "token": TOKEN}
    overview = click(client.post, "/sign-in", data=signed)  # 2, redirected to the list
    link = re.search(r'href="([^"]*/intent\?key=[^"]+)"[^§]{0,400}?invoice 7 for customer hal', overview.text)
    assert link, overview.text
    page = click(client.get, link[1])  # 3
    assert "&#39;hal&#39;" in page.text
    click(
        client.post, "/resolve", data={**hidden(page), "decision": "run", "evidence": "not in billing"}
    )  # 4
    assert len(clicks) == 4
    assert on.answered(result.id) == "inv-hal-7"
    assert on.effects.count("hal") == 1
