"""All ways to dispatch a Celery task: one test for each row of docs/reference/dispatch.md.

Each test sends the same intent several times. Every caller must receive the result, and the effect must happen once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.beat import ScheduleEntry
from celery.exceptions import TimeoutError as NoResultYet
from celery.schedules import crontab

from celery_idem.adapters.beat import Entry, Scheduler, aligned, due_at
from tests.support.effects import Effects
from tests.support.processes import Program
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for
from tests.support.workers import ROOT

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("worker")]

WITHIN = 20.0  # seconds to wait for a result: the machine may be busy, and duplicates go back to the queue


def paid(cents: int) -> dict[str, Any]:
    return {"paid": cents, "invoice": "7"}


def test_delay(shop: Celery, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    results = [pay.delay(name, "7", 1), pay.delay(customer=name, cents=1, invoice="7", note="again")]
    assert [result.get(WITHIN) for result in results] == [paid(1)] * 2
    assert done.count(f"pay-{name}-7") == 1


def test_apply_async(shop: Celery, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    results = [
        pay.apply_async((name, "7", 1), scope="a"),
        pay.apply_async((name, "7"), {"cents": 1}, scope="a"),
    ]
    results += [pay.apply_async((name, "7", 1), scope="a", countdown=0.1, headers={"mine": "stays"})]
    assert [result.get(WITHIN) for result in results] == [paid(1)] * 3
    assert done.count(f"pay-{name}-7") == 1
    pay.apply_async((name, "7", 1), scope="b").get(WITHIN)
    assert done.count(f"pay-{name}-7") == 2


def test_send_task(redis: RedisServer, shop: Celery, done: Effects, name: str) -> None:
    """`send_task` is guarded whether or not the sending application knows the task. It never uses the task class."""
    stranger = Celery("stranger", broker=redis.url, backend=redis.url, set_as_current=False)
    results = [app.send_task("shop.pay", (name, "7", 1)) for app in (stranger, shop, stranger)]
    results += [stranger.send_task("shop.pay", (), {"invoice": "7", "cents": 1, "customer": name})]
    assert [result.get(WITHIN) for result in results] == [paid(1)] * 4
    assert done.count(f"pay-{name}-7") == 1
    stranger.send_task("shop.pay", (name, "7", 1), headers={"idem-occurrence": "second"}).get(WITHIN)
    assert done.count(f"pay-{name}-7") == 2


def test_signature(shop: Celery, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    signatures = [pay.s(name, "7", 1), pay.si(name, "7", cents=1), pay.s("7", 1).clone((name,))]
    signatures.append(shop.signature("shop.pay", (name, "7", 1)))
    results = [signature.set(occurrence="x").apply_async() for signature in signatures]
    assert [result.get(WITHIN) for result in results] == [paid(1)] * 4
    assert done.count(f"pay-{name}-7") == 1


def test_chain(shop: Celery, done: Effects, name: str) -> None:
    number, after = shop.tasks["shop.number"], shop.tasks["shop.after"]
    results = [chain(number.s(name, 5), after.s(name)).apply_async() for _ in range(3)]
    assert [result.get(WITHIN) for result in results] == [5] * 3
    assert (done.count(f"number-{name}-5"), done.count(f"after-{name}")) == (1, 1)


def test_group(shop: Celery, done: Effects, name: str) -> None:
    number = shop.tasks["shop.number"]
    results = [group(number.s(name, value) for value in (1, 2, 1)).apply_async() for _ in range(2)]
    assert [result.get(WITHIN) for result in results] == [[1, 2, 1]] * 2
    assert (done.count(f"number-{name}-1"), done.count(f"number-{name}-2")) == (1, 1)


def test_chord(shop: Celery, done: Effects, name: str) -> None:
    """A chord completes when its header has a duplicate: the replay counts as one of the header's results."""
    number, total = shop.tasks["shop.number"], shop.tasks["shop.total"]
    results = [
        chord([number.s(name, 1), number.s(name, 2), number.s(name, 2)])(total.s(name)) for _ in range(2)
    ]
    assert [result.get(WITHIN) for result in results] == [5, 5]
    assert (done.count(f"number-{name}-2"), done.count(f"total-{name}")) == (1, 1)


def test_link(shop: Celery, done: Effects, name: str) -> None:
    """A replay is a success, so Celery publishes its links again. The linked task has its own guard."""
    number, after = shop.tasks["shop.number"], shop.tasks["shop.after"]
    for _ in range(2):
        number.apply_async((name, 3), link=after.s(name)).get(WITHIN)
    assert done.wait(f"after-{name}")
    assert after.submit(3, name).wait(WITHIN).result == 3
    assert (done.count(f"number-{name}-3"), done.count(f"after-{name}")) == (1, 1)


def test_replace_by_a_guarded_task(shop: Celery, done: Effects, name: str) -> None:
    hands_over = shop.tasks["shop.hands_over"]
    results = [hands_over.delay(name, "shop.number") for _ in range(3)]
    assert [result.get(WITHIN) for result in results] == [1] * 3
    assert done.count(f"number-{name}-1") == 1


def test_replace_by_a_plain_task(shop: Celery, done: Effects, name: str) -> None:
    """The plain task is published once. Duplicates receive the result of the first."""
    hands_over = shop.tasks["shop.hands_over"]
    results = [hands_over.delay(name, "shop.plain") for _ in range(3)]
    assert [result.get(WITHIN) for result in results] == [f"plain {name}"] * 3
    receipt = hands_over.submit(name, "shop.plain").wait(WITHIN)
    assert (receipt.status, receipt.result) == ("replayed", f"plain {name}")
    assert done.count(f"plain-{name}") == 1


def test_replace_keeps_scope_and_occurrence(shop: Celery, done: Effects, name: str) -> None:
    """The replacement keeps the occurrence. Without it, the second month would replay the first month's result."""
    hands_over = shop.tasks["shop.hands_over"]
    for occurrence in ("2026-11", "2026-12", "2026-12"):
        assert hands_over.apply_async((name, "shop.number"), occurrence=occurrence).get(WITHIN) == 1
    assert done.count(f"number-{name}-1") == 2


def test_replace_inside_a_chain(shop: Celery, done: Effects, name: str) -> None:
    hands_over, after = shop.tasks["shop.hands_over"], shop.tasks["shop.after"]
    results = [
        chain(hands_over.s(name, "shop.plain"), after.s(name)).apply_async(occurrence="x") for _ in range(2)
    ]
    assert [result.get(WITHIN) for result in results] == [f"plain {name}"] * 2
    assert (done.count(f"plain-{name}"), done.count(f"after-{name}")) == (1, 1)


def test_chunks(shop: Celery, done: Effects, name: str) -> None:
    number = shop.tasks["shop.number"]
    calls = [(name, 1), (name, 2), (name, 1)]
    results = [number.chunks(calls, 2).apply_async() for _ in range(2)]
    assert [result.get(WITHIN) for result in results] == [[[1, 2], [1]]] * 2
    assert (done.count(f"number-{name}-1"), done.count(f"number-{name}-2")) == (1, 1)


def test_map_and_starmap(shop: Celery, done: Effects, name: str) -> None:
    number = shop.tasks["shop.number"]
    assert number.starmap([(name, 1), (name, 1)]).delay().get(WITHIN) == [1, 1]
    assert done.count(f"number-{name}-1") == 1
    assert shop.tasks["shop.greet"].map([name, name]).delay().get(WITHIN) == [f"greeted {name}"] * 2
    assert done.count(f"greet-{name}") == 1


def test_eager_and_direct(shop: Celery, done: Effects, name: str) -> None:
    pay = shop.tasks["shop.pay"]
    assert pay.apply((name, "7", 1)).get() == paid(1)
    assert pay(name, "7", cents=1) == paid(1)
    assert pay.delay(name, "7", 1).get(WITHIN) == paid(1)
    assert done.count(f"pay-{name}-7") == 1


def test_retry_of_the_caller(shop: Celery, done: Effects, name: str) -> None:
    """A client that times out and calls again in a loop receives the result of the one effect."""
    pay = shop.tasks["shop.pay"]
    for _ in range(10):
        try:
            answer = pay.delay(name, "7", 1).get(0.001)
            break
        except NoResultYet:
            continue
    else:
        answer = pay.delay(name, "7", 1).get(WITHIN)
    assert answer == paid(1)
    assert done.count(f"pay-{name}-7") == 1


# --- Django ----------------------------------------------------------------------------

DJANGO = """
import sys
import django
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from celery import Celery
from celery.contrib.django.task import DjangoTask
from django.db import transaction
from celery_idem import IdempotentTask

class Base(IdempotentTask, DjangoTask):
    pass

url, name = sys.argv[1:]
app = Celery("django-shop", broker=url, backend=url)

@app.task(base=Base, name="shop.pay", intent=("customer", "invoice"), must_match=("cents", "currency"))
def pay(customer, invoice, cents, currency="EUR", note=""): ...

sent = []
publish = Base.apply_async
Base.apply_async = lambda self, *a, **k: sent.append(publish(self, *a, **k))
with transaction.atomic():
    pay.delay_on_commit(name, "7", 1)
    pay.apply_async_on_commit((name, "7"), {"cents": 1, "note": "again"}, occurrence=None)
    assert sent == [], "published before the commit"
try:
    with transaction.atomic():
        pay.delay_on_commit(name, "8", 1)
        raise RuntimeError("rolled back")
except RuntimeError:
    pass
print([result.get(20) for result in sent])
"""


def test_django_on_commit(redis: RedisServer, done: Effects, name: str) -> None:
    """Calls on commit are published after the commit and not after a rollback.

    This runs in a separate process because Django's settings can be set once per process.
    """
    words = [sys.executable, "-c", DJANGO, redis.url, name]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str([paid(1)] * 2)
    assert (done.count(f"pay-{name}-7"), done.count(f"pay-{name}-8")) == (1, 0)


# --- beat ------------------------------------------------------------------------------


def test_two_beats(shop: Celery, shop_env: dict[str, str], done: Effects, tmp_path: Path, name: str) -> None:
    """Two beats send every tick, and each tick has one effect."""
    env = {**os.environ, **shop_env, "CALLERS_TICKER": name, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "celery", "-A", "tests.callers.beat_app:app", "beat", "--loglevel", "INFO"]
    words += ["--scheduler", "celery_idem.adapters.beat:Scheduler", "--pidfile", ""]
    beats = [
        Program([*words, "--schedule", tmp_path / f"beat{n}"], log=tmp_path / f"{n}.log", env=env)
        for n in (1, 2)
    ]
    started = datetime.now(timezone.utc)
    try:
        for beat in beats:
            beat.wait_until_ready(lambda beat=beat: beat.log_text().count("often") >= 4, 40)
    finally:
        for beat in beats:
            beat.stop()
    fired = [beat.log_text().count("(shop.number)") for beat in beats]
    passed = (datetime.now(timezone.utc) - started).total_seconds()
    with shop.connection_for_read() as connection:
        client = connection.default_channel.client
        queue = shop.conf.task_default_queue
        wait_for(
            lambda: not client.llen(queue) and not client.hlen("unacked"),
            message="the worker to run all calls",
        )
    ticks = done.count(f"number-{name}-1")
    assert 4 <= ticks <= passed + 1, (fired, passed)
    assert ticks < sum(fired) / 2, "calls of both beats had effects"  # half of the calls are of this entry
    assert done.count(f"number-{name}-2") == 1  # an occurrence in the entry's options is kept
    assert ticks - 1 <= done.count(f"pay-{name}-7") <= passed + 1


def test_two_beats_on_one_database(
    shop: Celery, shop_env: dict[str, str], done: Effects, tmp_path: Path, name: str
) -> None:
    """With django-celery-beat and the mix-in, a tick that both beats send has one effect. The next tick has another."""
    now = datetime.now(timezone.utc)
    env = {
        **os.environ,
        **shop_env,
        "CALLERS_TICKER": name,
        "CALLERS_DATABASE": str(tmp_path / "beat.sqlite3"),
        "CALLERS_LAST_RUNS": " ".join((now - timedelta(minutes=ago)).isoformat() for ago in (10, 5)),
    }
    words = [sys.executable, "-m", "tests.callers.django_beats"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)
    assert ran.returncode == 0, ran.stderr
    *sent, found = ran.stdout.splitlines()
    assert len(set(sent)) == 4, "each of the beats sends each tick"
    assert [shop.AsyncResult(task_id).get(WITHIN) for task_id in sent] == [1] * 4
    assert done.count(f"number-{name}-1") == 2
    without, with_ticks = json.loads(found)
    assert set(without) == {"beat shop.number", "beat shop.greet"}
    assert "('every minute')" in without["beat shop.number"]
    assert set(with_ticks) == {"beat-interval shop.greet"}


def tick(plan: Any, last: datetime, now: datetime) -> datetime:
    app = Celery("ticks", set_as_current=False)
    if not isinstance(plan, (int, float)):
        plan.nowfun = lambda: now
    entry = Entry(name="x", task="x", schedule=plan, last_run_at=last, app=app)
    if isinstance(plan, (int, float)):
        entry.schedule.nowfun = lambda: now
    return due_at(entry)


def at(text: str) -> datetime:
    # datetime.fromisoformat of Python 3.10 accepts only three or six decimals.
    when = datetime.strptime(f"2026-11-24 {text}{'' if '.' in text else '.0'}", "%Y-%m-%d %H:%M:%S.%f")  # noqa: DTZ007
    return when.replace(tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("plan", "last", "now", "due"),
    [
        (10, "10:00:03.2", "10:00:10.001", "10:00:10"),
        (10, "10:00:09.999", "10:00:10.4", "10:00:10"),  # another beat, another phase: the same tick
        (10, "10:00:10.001", "10:00:20.002", "10:00:20"),
        (10, "10:00:10.001", "10:07:00", "10:00:20"),  # after downtime: the first tick that it missed
        (0.5, "10:00:00.1", "10:00:00.6", "10:00:00.5"),
        (crontab(), "10:00:00.3", "10:01:00.2", "10:01:00"),
        (crontab(), "10:00:59.9", "10:01:04", "10:01:00"),
        (crontab(minute="30"), "09:31:00", "10:30:01", "10:30:00"),
    ],
)
def test_the_tick_is_the_first_one_due(plan: Any, last: str, now: str, due: str) -> None:
    assert tick(plan, at(last), at(now)) == at(due)


def test_no_tick_is_repeated() -> None:
    """A beat that runs late sends no tick twice, even if it is late by more than an interval."""
    plan = aligned(10)
    now = at("10:00:03")
    ticks = []
    for lateness in (0.0, 0.7, 0.01, 9.99, 0.0, 12.0, 0.3, 0.0):
        due = plan.tick_after(now)
        now = due + timedelta(seconds=lateness)
        ticks.append(due)
    assert len(set(ticks)) == len(ticks)
    assert ticks == sorted(ticks)
    plan.nowfun = lambda: at("10:00:04")
    plan.app = Celery("ticks", set_as_current=False)
    assert plan.is_due(at("10:00:03")) == (False, 6.0)
    assert plan.is_due(at("09:59:59")) == (True, 6.0)


def test_an_entry_keeps_what_it_is(tmp_path: Path) -> None:
    """The occurrence of one tick is not kept in the entry, and crontab schedules are not changed."""
    app = Celery("ticks", set_as_current=False)
    app.conf.beat_schedule_filename = str(tmp_path / "schedule")
    app.conf.beat_schedule = {
        "a": {"task": "x", "schedule": 10.0, "options": {"queue": "q", "headers": {"h": 1}}},
        "b": {"task": "x", "schedule": crontab()},
    }
    scheduler = Scheduler(app=app, schedule_filename=str(tmp_path / "schedule"))
    sent: list[dict[str, Any]] = []
    scheduler.send_task = lambda *a, **options: sent.append(options)
    entry = scheduler.schedule["a"]
    assert isinstance(entry.schedule, aligned)
    assert isinstance(scheduler.schedule["b"].schedule, crontab)
    scheduler.apply_async(entry)
    assert sent[0]["headers"]["idem-occurrence"] == due_at(entry).isoformat()
    assert (sent[0]["queue"], sent[0]["headers"]["h"]) == ("q", 1)
    following = scheduler.schedule["a"]
    assert following.total_run_count == 1
    assert "idem-occurrence" not in following.options["headers"]
    scheduler.close()
    again = Scheduler(app=app, schedule_filename=str(tmp_path / "schedule"))  # reads the file
    assert again.schedule["a"].total_run_count == 1
    assert isinstance(again.schedule["a"].schedule, aligned)
    assert isinstance(again.schedule["a"], ScheduleEntry)
    again.close()
