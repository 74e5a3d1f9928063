"""The HTTP adapter on a real server: the rules of the IETF draft, refused requests, limits, and a fuzzer."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery
from starlette.testclient import TestClient

from celery_idem import ConfigurationError, IdempotentTask
from celery_idem.adapters.http import door
from tests.callers import shop as shops
from tests.support.effects import Effects, Gate
from tests.support.servers import RedisServer, free_port
from tests.support.waiting import wait_for
from tests.support.workers import CeleryWorker

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("worker")]


@pytest.fixture
def client(http_url: str) -> Iterator[httpx.Client]:
    headers = {"authorization": "Bearer secret-a"}
    with httpx.Client(base_url=f"{http_url}/actions", headers=headers, timeout=20) as client:
        yield client


def bill(name: str, cents: int = 1, **more: Any) -> dict[str, Any]:
    return {"customer": name, "invoice": "7", "cents": cents, **more}


def test_replay_has_the_first_status_and_body(client: httpx.Client, done: Effects, name: str) -> None:
    key = {"idempotency-key": f'"{name}"'}
    first = client.post("/tasks/shop.pay", json=bill(name), headers=key)
    assert (first.status_code, first.json()["result"]) == (200, {"paid": 1, "invoice": "7"})
    assert "idempotent-replayed" not in first.headers
    for header in (key, {"idempotency-key": name}):  # quoted as in the draft, or bare
        again = client.post("/tasks/shop.pay", json=bill(name), headers=header)
        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["location"] == first.headers["location"]
    told = client.get(first.headers["location"].removeprefix("/actions"))
    assert (told.status_code, told.json()["status"]) == (200, "replayed")
    assert told.json()["result"] == {"paid": 1, "invoice": "7"}
    assert done.count(f"pay-{name}-7") == 1


def test_without_a_key_the_intent_is_the_identity(client: httpx.Client, done: Effects, name: str) -> None:
    bodies = [client.post("/tasks/shop.pay", json=bill(name, note=note)).content for note in "abc"]
    assert len(set(bodies)) == 1
    client.post("/tasks/shop.pay", json=bill(name), headers={"idem-occurrence": "second"})
    assert done.count(f"pay-{name}-7") == 2


def test_same_key_other_arguments(client: httpx.Client, done: Effects, name: str) -> None:
    key = {"idempotency-key": name}
    client.post("/tasks/shop.pay", json=bill(name, 987654), headers=key)
    other = client.post("/tasks/shop.pay", json=bill(name, 2), headers=key)
    assert (other.status_code, other.headers["content-type"]) == (422, "application/problem+json")
    told = other.json()
    assert (told["status"], told["differs"]) == (422, ["cents"])
    assert told["next"].startswith("Key already used with different cents.")
    assert "987654" not in other.text
    assert done.count(f"pay-{name}-7") == 1


def test_two_callers_with_the_same_key(client: httpx.Client, done: Effects, name: str) -> None:
    for token in ("secret-a", "secret-b"):
        headers = {"idempotency-key": name, "authorization": f"Bearer {token}"}
        assert client.post("/tasks/shop.pay", json=bill(name), headers=headers).status_code == 200
    assert done.count(f"pay-{name}-7") == 2


def test_in_progress(client: httpx.Client, folder: Path, done: Effects, name: str) -> None:
    first = client.post("/tasks/shop.slow", json={"name": name}, headers={"prefer": "wait=0"})
    assert (first.status_code, first.json()["status"]) == (202, "accepted")
    assert int(first.headers["retry-after"]) >= 1
    done.wait(f"slow-{name}")
    second = client.post("/tasks/shop.slow", json={"name": name}, headers={"prefer": "respond-async, wait=0"})
    assert (second.status_code, second.json()["type"]) == (409, "urn:celery-idem:in_progress")
    assert int(second.headers["retry-after"]) >= 1
    where = first.headers["location"].removeprefix("/actions")
    assert client.get(where).json()["status"] == "in_progress"
    Gate(folder / f"gate-{name}").open()
    third = client.post("/tasks/shop.slow", json={"name": name})
    assert (third.status_code, third.json()["result"]) == (200, f"slow {name}")
    assert third.headers["idempotent-replayed"] == "true"
    assert done.count(f"slow-{name}") == 1


@pytest.mark.parametrize(
    ("how", "status", "kind", "count"),
    [("error", 500, "failed", 1), ("brief", 503, "nothing_done", 2), ("doubt", 409, "in_doubt", 1)],
)
def test_what_went_wrong(
    client: httpx.Client, done: Effects, name: str, how: str, status: int, kind: str, count: int
) -> None:
    answers = [client.post("/tasks/shop.fails", json={"name": name, "how": how}) for _ in range(2)]
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:celery-idem:{kind}")
        assert answer.json()["next"]
        assert ("retry-after" in answer.headers) == (status == 503)
    assert done.count(f"fails-{name}") == count


def test_a_result_that_was_not_kept_says_so(client: httpx.Client, done: Effects, name: str) -> None:
    answers = [client.post("/tasks/shop.large", json={"name": name}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].content == answers[1].content
    assert answers[1].json()["result"] is None
    assert "idem_max_result_bytes" in answers[1].json()["not_kept"]
    assert done.count(f"large-{name}") == 1


def test_required_key(http_url: str, done: Effects, name: str) -> None:
    with httpx.Client(base_url=f"{http_url}/strict", headers={"x-user": "ada"}, timeout=20) as client:
        without = client.post("/tasks/shop.pay", json=bill(name))
        assert (without.status_code, without.json()["type"]) == (400, "urn:celery-idem:key_required")
        assert (
            client.post("/tasks/shop.pay", json=bill(name), headers={"idempotency-key": "1"}).status_code
            == 200
        )
    assert done.count(f"pay-{name}-7") == 1


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret-a"}, {"authorization": "Bearer"}],
)
def test_closed(http_url: str, done: Effects, name: str, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=f"{http_url}/actions", headers=headers, timeout=20) as client:
        answers = [
            client.post("/tasks/shop.pay", json=bill(name)),
            client.get("/intents/shop.pay:00000000000000000000000000000000"),
            client.get("/openapi.json"),
        ]
    assert [answer.status_code for answer in answers] == [401] * 3
    assert answers[0].headers["www-authenticate"] == "Bearer"
    assert done.count(f"pay-{name}-7") == 0


def test_only_what_is_listed(client: httpx.Client, shop: Celery, name: str) -> None:
    receipt = shop.tasks["shop.number"].submit(name, 1).wait(20)
    assert client.post("/tasks/shop.number", json={"name": name, "value": 1}).status_code == 404
    assert client.get(f"/intents/{receipt.key}").status_code == 404
    assert client.get("/intents/nonsense").status_code == 404
    assert client.get("/tasks/shop.pay").status_code == 405
    assert client.get("/tasks/shop.pay").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"", "application/json", 400),
        (b"\xff", "application/json", 400),
        (b'{"customer": "x"}', "application/json", 400),
        (b'{"customer": "x", "invoice": "7", "cents": "1"}', "application/json", 400),
        (b'{"customer": "x", "invoice": "7", "cents": 1, "more": 1}', "application/json", 400),
        (b'{"customer": "x", "invoice": "7", "cents": NaN}', "application/json", 400),
        (b"[" * 9_000, "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}" + b" " * 20_000, "application/json", 413),
    ],
)
def test_bounds(client: httpx.Client, body: bytes, kind: str, status: int) -> None:
    answer = client.post("/tasks/shop.pay", content=body, headers={"content-type": kind})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["status"] == status


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, '"unfinished', "naïve"])
def test_bad_keys(client: httpx.Client, name: str, key: str) -> None:
    headers = [("idempotency-key", key.encode())]
    assert client.post("/tasks/shop.pay", json=bill(name), headers=headers).status_code == 400


def test_two_keys(client: httpx.Client, name: str) -> None:
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    assert client.post("/tasks/shop.pay", json=bill(name), headers=headers).status_code == 400


def test_a_body_without_an_end(http_url: str) -> None:
    """A body above the limit is refused, also if it is chunked and has no Content-Length."""

    def chunks() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 1000

    headers = {"authorization": "Bearer secret-a", "content-type": "application/json"}
    try:
        answer = httpx.post(
            f"{http_url}/actions/tasks/shop.pay", content=chunks(), headers=headers, timeout=20
        )
    except httpx.WriteError:  # the server closed the connection before the whole body was sent
        return
    assert answer.status_code == 413


def test_document(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["servers"] == [{"url": "/actions"}]
    assert set(document["paths"]) == {
        "/tasks/shop.pay",
        "/tasks/shop.slow",
        "/tasks/shop.fails",
        "/tasks/shop.large",
        "/intents/{key}",
    }
    schema = document["paths"]["/tasks/shop.pay"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    roles = {parameter: entry["x-idem"] for parameter, entry in schema["properties"].items()}
    assert roles == {
        "customer": "intent",
        "invoice": "intent",
        "cents": "must_match",
        "currency": "must_match",
        "note": "free",
    }
    assert schema["required"] == ["customer", "invoice", "cents"]


def test_servers_away(redis: RedisServer, folder: Path, name: str) -> None:
    """Without the broker a call is accepted. Without the store it is refused, and calling again is safe."""
    away = f"redis://127.0.0.1:{free_port()}/0"
    app = shops.make(away, folder, result_backend=redis.url, **shops.NO_BROKER)
    headers = {"authorization": "Bearer x", "prefer": "wait=0"}
    client = TestClient(door(app, ["shop.pay"], token="x"))
    answer = client.post("/tasks/shop.pay", json=bill(name), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (202, "not_sent")
    app = shops.make(redis.url, folder, idem_store=away)
    client = TestClient(door(app, ["shop.pay"], token="x"))
    answer = client.post("/tasks/shop.pay", json=bill(name), headers=headers)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "Safe to call again unchanged" in answer.json()["next"]
    gone = client.get(
        f"/intents/{shops.make(redis.url, folder).tasks['shop.pay'].intent_key(name, '7', 1)}",
        headers=headers,
    )
    assert gone.status_code == 503


def test_what_cannot_be_offered() -> None:
    app = Celery("mistakes", set_as_current=False)
    app.conf.idem_store = "memory://"

    @app.task(base=IdempotentTask, shared=False, name="m.star", intent=("first",))
    def star(first: int, *rest: int) -> None: ...

    @app.task(base=IdempotentTask, shared=False, name="m.odd", intent=("first",))
    def odd(first: Callable[[], int]) -> None: ...

    @app.task(shared=False, name="m.plain")
    def plain() -> None: ...

    for task, words in [
        ("m.star", r"takes \*rest"),
        ("m.odd", "no JSON schema"),
        ("m.plain", "no intent"),
        ("m.none", "no task"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            door(app, [task], token="x")
    for closed in ({}, {"token": ""}, {"token": {}}, {"token": "x", "authenticate": lambda request: ""}):
        with pytest.raises(ConfigurationError, match="needs to know who may use it"):
            door(app, [], **closed)


@pytest.mark.slow
def test_fuzzed_against_its_own_document(http_url: str, tmp_path: Path, done: Effects) -> None:
    words = [
        Path(sys.executable).with_name("schemathesis"),
        "run",
        f"{http_url}/actions/openapi.json",
        "--header=Authorization: Bearer secret-a",
        "--header=Prefer: wait=0",
        "--include-path-regex=pay|intents",  # the other tasks fail or wait on purpose
        "--max-examples=15",
        "--phases=examples,coverage,fuzzing",
        "--seed=7",
        "--generation-database=none",
        "--no-color",
    ]
    # Valid data may conflict with an earlier call. All other checks stay as they are.
    (tmp_path / "schemathesis.toml").write_text(
        '[checks]\npositive_data_acceptance.expected-statuses = ["2xx", 404, 409, 422]\n'
    )
    ran = subprocess.run(words, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    wait_for(lambda: any(effect["note"] for effect in done.all() if str(effect["intent"]).startswith("pay-")))


def test_worker_is_there(worker: CeleryWorker) -> None:
    """The worker is alive after the requests of the fuzzer."""
    assert worker.alive


def test_half_a_surrogate_pair_is_answered(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """UTF-8 has no form for half of a cut emoji, and the action is done all the same."""
    app = Celery("cut", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.idem_store = redis_url

    @app.task(base=IdempotentTask, name="cut.say", intent=("n",), shared=False)
    def say(n: int) -> str:
        if n > 1:
            raise ValueError("cut \ud83d")
        return "cut \ud83d"

    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # xdist cannot send such a log
    say.apply((1,))
    say.apply((2,))
    headers = {"Authorization": "Bearer t"}
    with TestClient(door(app, ["cut.say"], token="t", wait=1), headers=headers) as client:
        done, failed = (client.post("/tasks/cut.say", json={"n": n}) for n in (1, 2))
        looked = client.get(f"/intents/{say.intent_key(1)}")
    assert (done.status_code, done.json()["result"]) == (200, "cut \ud83d")
    assert (failed.status_code, looked.status_code) == (500, 200)
    assert failed.json()["type"].endswith("failed"), ascii(failed.text)
