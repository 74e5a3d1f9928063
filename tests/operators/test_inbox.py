"""The inbox: access, safety of its pages and forms, decisions, and use by keyboard, on a phone or in dark mode."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from celery import Celery
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from celery_idem import ConfigurationError, Ledger, NotHappened
from celery_idem.adapters.inbox import inbox
from tests.operators.browser import served
from tests.operators.forms import form_for, hidden
from tests.operators.intents import claimed, in_doubt, message, succeeded
from tests.operators.shop import remind, send_invoice
from tests.operators.test_thousand import TOKEN, sign_in
from tests.support.waiting import wait_for

PICTURES = Path(__file__).parents[2] / "docs" / "img"


def key(customer: str) -> str:
    return send_invoice.intent_key(customer, 7)


@pytest.fixture
def client(app: Celery) -> TestClient:
    """A client in which the operator "ann" is signed in."""
    client = TestClient(inbox(app, token=TOKEN))
    assert post(client, "/sign-in", name="ann", token=TOKEN).url.path == "/"
    return client


def post(client: TestClient, path: str, **form: str) -> Any:
    """Send the form of an intent's page for "/resolve", or the form of the first page."""
    ours = form_for(client, form["key"]) if path == "/resolve" else hidden(client.get("/"))
    return client.post(path, data={**ours, **form})


# --- access -----------------------------------------------------------------------------


def test_it_does_not_open_without_a_token_or_the_hosts_word(app: Celery) -> None:
    for wrong in ({}, {"token": "short"}, {"token": TOKEN, "authenticate": lambda request: "x"}):
        with pytest.raises(ConfigurationError):
            inbox(app, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["/", "/intent?key=x", "/intent", "/?settled=x"])
def test_a_stranger_sees_nothing(app: Celery, ledger: Ledger, path: str) -> None:
    in_doubt(ledger, key("a"))
    stranger = TestClient(inbox(app, token=TOKEN))
    page = stranger.get(path)
    assert page.url.path == "/sign-in"
    assert "shop." not in page.text


def test_a_stranger_changes_nothing(app: Celery, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    stranger = TestClient(inbox(app, token=TOKEN))
    for cookies in ({}, {"idem_session": "9999999999.YW5u.forged"}, {"idem_session": "."}):
        stranger.cookies.update(cookies)
        form = {**hidden(stranger.get("/")), "key": key("a"), "decision": "not_happened", "evidence": "x"}
        answer = stranger.post("/resolve", data=form)
        assert answer.status_code == 401
        assert "<title>Unauthorized" in answer.text
    assert state(ledger, "a") == "in_doubt"


def test_a_wrong_token(app: Celery) -> None:
    client = TestClient(inbox(app, token=TOKEN))
    assert post(client, "/sign-in", name="ann", token="wrong").status_code == 401
    assert client.get("/").url.path == "/sign-in"


def test_the_hosts_own_sign_in(app: Celery, ledger: Ledger) -> None:
    async def who(request: Any) -> str | None:
        return request.headers.get("x-user")

    in_doubt(ledger, key("a"))
    site = Starlette(routes=[Mount("/ops/idem", inbox(app, authenticate=who))])
    client = TestClient(site)
    assert client.get("/ops/idem/").status_code == 401
    client.headers["x-user"] = "bob"
    page = client.get("/ops/idem/")
    assert 'href="/ops/idem/intent?key=' in page.text
    form = form_for(client, key("a"), "/ops/idem")
    client.post("/ops/idem/resolve", data={**form, "decision": "happened", "evidence": "x", "result": "1"})
    entry = ledger.get(key("a"))
    assert entry is not None
    assert entry.record.notes[-1].by == "bob"


def state(ledger: Ledger, customer: str) -> str:
    entry = ledger.get(key(customer))
    assert entry is not None
    return entry.state


# --- safety -----------------------------------------------------------------------------


def test_a_form_of_another_site_is_refused(client: TestClient, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    ours = {**form_for(client, key("a")), "decision": "not_happened", "evidence": "x"}
    assert client.post("/resolve", data={**ours, "csrf": ""}).status_code == 403
    assert client.post("/resolve", data={**ours, "csrf": "0" * 43}).status_code == 403
    assert client.post("/resolve", data=ours, headers={"origin": "https://evil.example"}).status_code == 403
    assert client.post("/resolve", data={**ours, "evidence": "x" * 100_000}).status_code == 413
    assert state(ledger, "a") == "in_doubt"
    assert client.post("/resolve", data=ours, headers={"origin": "http://testserver"}).status_code == 200
    assert state(ledger, "a") == "released"


def test_pages_forbid_scripts_and_frames(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["cache-control"] == "no-store"
    assert "<script" not in page.text
    assert " style=" not in page.text


def test_what_people_and_records_say_is_escaped(client: TestClient, ledger: Ledger) -> None:
    evil = "<img src=x onerror=alert(1)>"
    in_doubt(ledger, key("a"), reason=evil)
    succeeded(ledger, key("b"), evil)
    in_doubt(ledger, key("c"))
    post(client, "/resolve", key=key("c"), decision="happened", evidence=evil, result=f'"{evil}"')
    wrong = post(client, "/resolve", key=key("a"), decision="happened", evidence=evil, result=evil)
    assert wrong.status_code == 400
    texts = [wrong.text, client.get("/").text, client.get("/", params={"settled": evil}).text]
    texts += [client.get("/intent", params={"key": k}).text for k in (key("a"), key("b"), key("c"), evil)]
    assert not any("<img" in text for text in texts)
    assert sum("&lt;img" in text for text in texts) >= 5


def test_secrets_are_nowhere(client: TestClient, app: Celery) -> None:
    remind.apply(("a",), {"token": "s3cret"})  # its result quotes the token
    pages = [client.get("/").text, client.get("/intent", params={"key": remind.intent_key("a")}).text]
    assert "succeeded" in pages[1]
    assert not any("s3cret" in page for page in pages)


# --- deciding ---------------------------------------------------------------------------


def test_a_decision_needs_evidence_and_json_and_keeps_what_was_typed(
    client: TestClient, ledger: Ledger
) -> None:
    in_doubt(ledger, key("a"))
    assert post(client, "/resolve", key=key("a"), decision="not_happened", evidence=" ").status_code == 400
    wrong = post(client, "/resolve", key=key("a"), decision="happened", evidence="seen", result="inv_7")
    assert "not JSON" in wrong.text
    assert 'value="seen"' in wrong.text
    assert state(ledger, "a") == "in_doubt"
    post(client, "/resolve", key=key("a"), decision="happened", evidence="seen", result='"inv_7"')
    assert send_invoice.apply(("a", 7)).get() == "inv_7"


def test_two_people_decide_at_once(client: TestClient, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    seen = form_for(client, key("a"))["fence"]
    post(client, "/resolve", key=key("a"), decision="happened", evidence="seen", result="1")
    late = post(client, "/resolve", key=key("a"), decision="not_happened", evidence="not there", fence=seen)
    assert "not in doubt" in late.text
    assert state(ledger, "a") == "succeeded"


def test_a_decision_is_about_the_attempt_that_the_page_showed(client: TestClient, ledger: Ledger) -> None:
    in_doubt(ledger, key("a"))
    seen = form_for(client, key("a"))["fence"]
    ledger.resolve(key("a"), NotHappened(), by="bob")
    in_doubt(ledger, key("a"))  # claimed again, and in doubt again
    form = {"key": key("a"), "decision": "not_happened", "evidence": "not there"}
    late = post(client, "/resolve", **form, fence=seen)
    assert "changed since you looked" in late.text
    assert state(ledger, "a") == "in_doubt"
    again = re.search(r'name="fence" value="(\d+)"', late.text)
    assert again is not None
    post(client, "/resolve", **form, fence=again[1])
    assert state(ledger, "a") == "released"
    assert "not complete" in post(client, "/resolve", **form, fence="").text


def test_what_is_running_has_no_buttons(client: TestClient, ledger: Ledger) -> None:
    claimed(ledger, key("a"), lease=600)
    assert "<button name=" not in client.get("/intent", params={"key": key("a")}).text


def test_the_timeline_of_a_contested_intent(client: TestClient, ledger: Ledger) -> None:
    claimed(ledger, key("a"), lease=0)  # its worker stopped renewing
    post(client, "/resolve", key=key("a"), decision="not_happened", evidence="looked twice")
    text = client.get("/intent", params={"key": key("a")}).text
    story = re.findall(r"(claimed|last heard of|not happened|released)", text.partition("What happened")[2])
    assert story == ["last heard of", "not happened", "claimed", "released"]
    assert "looked twice" in text
    assert "ann" in text


# --- many records -------------------------------------------------------------------------


@pytest.fixture
def half_way(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reading the store stops after three records until the event is set. Pages do not wait for it."""
    go = threading.Event()
    read = ledger.store.open

    def slow(*asked: Any) -> Iterator[Any]:
        for n, item in enumerate(read(*asked)):
            if n == 3:
                assert go.wait(20)
            yield item

    monkeypatch.setattr(ledger.store, "open", slow)
    monkeypatch.setattr("celery_idem.adapters.inbox.PATIENCE", 0.01)
    monkeypatch.setattr("celery_idem.adapters.inbox_pages.STRIDE", 3)
    yield go
    go.set()


def test_many_records_are_shown_as_far_as_they_are_read(
    app: Celery, ledger: Ledger, half_way: threading.Event
) -> None:
    for n in range(4):
        in_doubt(ledger, key(f"c{n}"))
    client = TestClient(inbox(app, token=TOKEN))
    post(client, "/sign-in", name="ann", token=TOKEN)
    wait_for(lambda: "what 3 records say" in client.get("/").text, 20, "what was read so far")
    page = client.get("/").text
    assert "At least 3 intents wait" in page
    assert "Look again" in page

    # A decided intent is not shown again, although the reading began before the decision.
    chosen = unquote(re.findall(r'/intent\?key=([^"]+)"', page)[0])
    post(client, "/resolve", key=chosen, decision="not_happened", evidence="not there")
    page = client.get("/").text
    assert "At least 2 intents wait" in page
    assert f">{chosen}<" not in page

    half_way.set()
    wait_for(lambda: "Read at" in client.get("/").text, 20, "the whole reading")
    page = client.get("/").text
    assert ">3 intents wait" in page
    assert f">{chosen}<" not in page


# --- many intents ---------------------------------------------------------------------------


@pytest.fixture
def outage(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many intents of two tasks in doubt, and some in other states."""
    monkeypatch.setattr("celery_idem.adapters.inbox.PATIENCE", 60.0)
    for n in range(110):
        in_doubt(ledger, key(f"cus-{n}"), "the body was interrupted by ReadTimeout")
    for n in range(3):
        in_doubt(ledger, remind.intent_key(f"cus-{n}"))
    claimed(ledger, key("busy"))
    succeeded(ledger, key("fine"))


def test_pages_and_filters(outage: None, client: TestClient, ledger: Ledger) -> None:
    def listed(**query: str) -> list[str]:
        page = client.get("/", params=query).text
        heading = re.search(r"<h1>(\d+) intents? waits?", page)
        assert heading
        counts.append(int(heading[1]))
        return [unquote(found) for found in re.findall(r'/intent\?key=([^"]+)"', page)]

    counts: list[int] = []  # in the heading: the number that an operator has to type
    pages = [listed(page=str(n)) for n in (1, 2, 3)]
    assert [len(page) for page in pages] == [50, 50, 13]
    assert len({key for page in pages for key in page}) == 113
    assert listed(page="4") == pages[2]
    assert listed(page="nonsense") == listed(page="0") == pages[0]
    assert len(listed(task="shop.remind")) == 3
    assert len(listed(reason="readtimeout", page="3")) == 10
    assert listed(older_than="3600") == listed(scope="acme") == []
    assert len(listed(older_than="1e999", scope="")) == 50
    assert counts == [113] * 6 + [3, 110, 0, 0, 113]
    filtered = client.get("/", params={"reason": "ReadTimeout"}).text
    assert "There are 113 in all." in filtered
    assert 'href="?reason=ReadTimeout&amp;page=2"' in filtered


def test_one_decision_for_all_that_a_filter_shows(outage: None, client: TestClient, ledger: Ledger) -> None:
    def decide(**form: str) -> Any:
        ours = hidden(client.get("/", params={"task": "shop.send_invoice"}))
        given = {"decision": "happened", "result": "null", "evidence": "the list of 14:03"}
        return client.post("/resolve-all", data={**ours, **given, **form})

    def states() -> dict[str, int]:
        return Counter(entry.state for entry in ledger.list())

    before = states()
    for wrong, status in (
        ({"number": "113"}, 400),
        ({"number": ""}, 400),
        ({"number": "110", "evidence": " "}, 400),
        ({"number": "110", "result": ""}, 400),
        ({"number": "110", "until": "nan"}, 400),
        ({"number": "110", "until": ""}, 400),
        ({"number": "110", "csrf": ""}, 403),
    ):
        assert decide(**wrong).status_code == status, wrong
    assert states() == before

    ours = hidden(client.get("/", params={"task": "shop.send_invoice"}))
    in_doubt(ledger, key("later"))  # the page did not show this intent, so it is not among the 110
    done = decide(**ours, number="110")
    assert "110 intents are succeeded now" in done.text
    assert states() == {"succeeded": 111, "in_doubt": 4, "running": 1}
    assert state(ledger, "later") == "in_doubt"
    note = ledger.get(key("cus-1")).record.notes[-1]  # type: ignore[union-attr]
    assert (note.by, note.evidence) == ("ann", "the list of 14:03")


def test_what_changed_since_the_page_was_shown_is_not_decided(
    outage: None, client: TestClient, ledger: Ledger
) -> None:
    ours = hidden(client.get("/", params={"task": "shop.remind"}))
    ledger.resolve(remind.intent_key("cus-0"), NotHappened(), by="bob")
    in_doubt(ledger, remind.intent_key("cus-0"))
    form = {**ours, "decision": "not_happened", "evidence": "none is there", "number": "3"}
    refused = client.post("/resolve-all", data=form)
    assert refused.status_code == 400
    assert "2 intents are still as this page showed them" in refused.text
    assert 'value="none is there"' in refused.text
    assert len(list(ledger.list("in_doubt", "shop.remind"))) == 3
    again = {**form, **hidden(refused)}
    assert "3 intents are released now" in client.post("/resolve-all", data=again).text


def test_who_decided_what(client: TestClient, ledger: Ledger, idem: Any) -> None:
    for customer in ("a", "b"):
        in_doubt(ledger, key(customer), call=message(customer, 7))
    ledger.resolve(key("b"), NotHappened(), by="bob", evidence="not there")
    post(client, "/resolve", key=key("a"), decision="happened", evidence="<inv_7> is there", result="7")
    page = client.get("/decisions").text
    assert page.index("&lt;inv_7&gt; is there") < page.index("bob")  # the latest first
    assert page.count("/intent?key=") == 2
    lines = [json.loads(line) for line in idem("decisions", "--json").output.splitlines()]
    assert {(line["by"], line["what"], line["key"], line["evidence"]) for line in lines} == {
        ("ann", "happened", key("a"), "<inv_7> is there"),
        ("bob", "not_happened", key("b"), "not there"),
    }
    assert [f"customer_id=&#39;{customer}&#39;" in page for customer in "ab"] == [True, True]
    assert {line["action"].partition(",")[0] for line in lines} == {"customer_id='a'", "customer_id='b'"}
    assert "bob" not in idem("decisions", "--by", "ann").output
    assert "No decisions" in idem("decisions", "--task", "shop.remind").output


# --- in a real browser --------------------------------------------------------------------


@pytest.fixture
def operator(app: Celery, ledger: Ledger) -> Iterator[str]:
    for n in range(60):
        succeeded(ledger, key(f"fine-{n}"))
    for n in range(4):
        claimed(ledger, key(f"busy-{n}"), lease=600)
    succeeded(ledger, remind.intent_key("a"))
    for n in range(6):
        known = {"call": message(f"cus-{n}", 7), "place": f"celery@web-{n % 2 + 1}, process {20411 + n}"}
        in_doubt(ledger, key(f"cus-{n}"), "the body was interrupted by ReadTimeout", **known)
    ledger.resolve(key("cus-5"), NotHappened(), by="bob", evidence="no invoice in billing at 14:03")
    claimed(ledger, key("silent"), lease=0, call=message("silent", 7), place="celery@web-3, process 118")
    with served(Starlette(routes=[Mount("/idem", inbox(app, token=TOKEN))])) as address:
        yield f"{address}/idem/"


def picture(browser: Any, name: str) -> None:
    """Take a picture. `make pictures` sets IDEM_PICTURES=1, which writes it to the documentation."""
    png = browser.get_screenshot_as_png()
    assert len(png) > 10_000
    if os.environ.get("IDEM_PICTURES") == "1":
        (PICTURES / name).write_bytes(png)


def wide(browser: Any) -> bool:
    """Return whether the page has to be scrolled sideways."""
    script = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
    return bool(browser.execute_script(script))


@pytest.fixture
def look(browser: webdriver.Chrome) -> Iterator[Callable[[str, int, int], None]]:
    """`look("dark", width, height)` sets the preferred colour scheme and the size of the window."""

    def prefer(scheme: str, width: int, height: int) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield prefer
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_light_dark_and_on_a_phone(operator: str, browser: webdriver.Chrome, look: Any) -> None:
    sign_in(browser, operator)
    grounds = set()
    for scheme, width, height, name in (
        ("light", 1280, 900, "inbox-light.png"),
        ("dark", 1280, 900, "inbox-dark.png"),
        ("light", 390, 844, "inbox-phone.png"),
    ):
        look(scheme, width, height)
        browser.get(operator)
        assert "6 intents wait" in browser.find_element(By.TAG_NAME, "h1").text
        assert not wide(browser)
        picture(browser, name)
        grounds.add(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
        browser.find_element(By.CSS_SELECTOR, ".doubtful a").click()
        browser.find_element(By.CSS_SELECTOR, ".timeline")
        assert not wide(browser)
        picture(browser, name.replace("inbox", "intent"))
    assert len(grounds) == 2  # the style sheet was applied, and it has a dark scheme
    look("light", 320, 844)  # the narrowest phone: no heading is cut, and no page scrolls sideways
    here = browser.current_url
    for address in (here, f"{operator}figures", f"{operator}decisions", operator):
        browser.get(address)
        assert browser.find_element(By.TAG_NAME, "h1").size["width"] > 250
        assert not wide(browser)
    browser.find_element(By.CSS_SELECTOR, "details.all summary").click()
    browser.find_element(By.ID, "number-no")
    assert not wide(browser)


def test_by_keyboard_alone(operator: str, browser: webdriver.Chrome, ledger: Ledger) -> None:
    sign_in(browser, operator)
    browser.get(operator)

    def tab_to(selector: str) -> Any:
        for _ in range(40):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            if browser.switch_to.active_element in browser.find_elements(By.CSS_SELECTOR, selector):
                return browser.switch_to.active_element
        raise AssertionError(f"the keyboard does not reach {selector}")

    link = tab_to(".doubtful a")
    chosen = link.find_element(By.CSS_SELECTOR, ".key").text
    assert link.value_of_css_property("outline-style") != "none"  # the focus is visible
    link.send_keys(Keys.ENTER)
    tab_to("#evidence-no").send_keys("nothing there")
    tab_to("button.no").send_keys(Keys.ENTER)
    assert "is released now" in browser.find_element(By.CSS_SELECTOR, ".done").text
    entry = ledger.get(chosen)
    assert entry is not None
    assert entry.state == "released"


def test_the_browser_itself_asks_for_evidence(
    operator: str, browser: webdriver.Chrome, ledger: Ledger
) -> None:
    sign_in(browser, operator)
    browser.get(operator)
    browser.find_element(By.CSS_SELECTOR, ".doubtful a").click()
    button = browser.find_element(By.CSS_SELECTOR, "button.no")
    here = browser.current_url
    button.click()
    assert browser.current_url == here
    assert browser.execute_script("return !document.querySelector('#evidence-no').validity.valid")


def test_every_field_has_a_label_and_the_console_is_quiet(operator: str, browser: webdriver.Chrome) -> None:
    sign_in(browser, operator)
    browser.get(operator)
    browser.find_element(By.CSS_SELECTOR, ".doubtful a").click()
    browser.find_element(By.CSS_SELECTOR, ".timeline")
    unlabelled = browser.execute_script(
        "return [...document.querySelectorAll('input:not([type=hidden]), textarea')]"
        ".filter(e => e.labels.length === 0).length"
    )
    assert unlabelled == 0
    # The browser reports violations of the content security policy here. It asks for /favicon.ico itself.
    told = [line for line in browser.get_log("browser") if "favicon" not in line["message"]]
    assert told == []
