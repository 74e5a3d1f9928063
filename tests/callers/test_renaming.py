"""A task that is renamed in a release: calls from both releases have the same idempotency keys."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_idem import ConfigurationError, IdempotentTask, submit
from celery_idem.operate import doctor
from celery_idem.operate.doctor import declared
from celery_idem.operate.operators import Operator
from celery_idem.telemetry import prometheus
from tests.operators.conftest import command_line
from tests.support.effects import Effects
from tests.support.servers import RedisServer

pytestmark = pytest.mark.redis

WITHIN = 20.0


def hello_body(name: str, note: str = "") -> None: ...
def body(a: int) -> None: ...


@pytest.mark.usefixtures("worker")
def test_an_action_under_the_old_name_is_not_done_again_under_the_new_one(
    redis: RedisServer, shop: Celery, done: Effects, name: str
) -> None:
    before = Celery("before", broker=redis.url, backend=redis.url, set_as_current=False)
    hello = before.task(base=IdempotentTask, shared=False, name="shop.hello", intent=("name",))(hello_body)
    stranger = Celery("stranger", broker=redis.url, backend=redis.url, set_as_current=False)
    greet = shop.tasks["shop.greet"]
    assert greet.intent_key(name) == hello.intent_key(name)

    sent = [
        hello.delay(name),  # a release that does not know the new name
        stranger.send_task("shop.hi", (name,), {"note": "by name, without a key"}),
        greet.delay(name, note="the new release"),
    ]
    assert [one.get(WITHIN) for one in sent] == [f"greeted {name}"] * 3
    assert greet.submit(name).status == submit(shop, "shop.hello", (name,)).status == "replayed"
    assert done.count(f"greet-{name}") == 1

    for task in ("shop.greet", "shop.hello"):
        assert greet.intent_key(name) in command_line(shop)("list", "--task", task).output
    shown = command_line(shop)("key", "shop.greet", f'["{name}"]').output
    assert greet.intent_key(name) in shown


def a_task(name: str, **options: object) -> Celery:
    app = Celery("names", set_as_current=False)
    app.conf.idem_store = "memory://names"
    app.task(base=IdempotentTask, shared=False, name=name, intent=("a",), **options)(body)
    app.finalize()
    return app


def test_the_first_name_is_the_one_in_keys() -> None:
    app = a_task("shop.c", aliases=("shop.a", "shop.b"))
    assert app.tasks["shop.c"] is app.tasks["shop.a"] is app.tasks["shop.b"]
    assert [name for name in app.tasks if name.startswith("shop.")][-1] == "shop.c", (
        "a worker's log shows the last name"
    )
    assert app.tasks["shop.b"].intent_key(1).startswith("shop.a:")
    seen = doctor.gather(app)
    assert [store.tasks.count("shop.c") for store in seen.stores] == [1]
    guarded = [task.name for task in seen.tasks if task.guarded]
    assert "shop.c" in guarded
    assert "shop.a" not in guarded
    assert declared.of_tasks(Operator(app).tasks())["shop.a"]["name"] == "shop.c"
    (counter,) = prometheus.Events(app).collect()
    counted = {sample.labels["task"] for sample in counter.samples}
    assert counted & {"shop.a", "shop.b", "shop.c"} == {"shop.a"}, "events use the first name"


@pytest.mark.parametrize("aliases", [("",), {"shop.a": 1}, 7])
def test_what_is_no_name_is_refused(aliases: object) -> None:
    with pytest.raises(ConfigurationError, match="names of the task, such as"):
        a_task("shop.c", aliases=aliases)


def test_a_name_for_the_next_release() -> None:
    """Workers of both releases know both names, and the key is the same."""
    apps = a_task("shop.a", aliases=("shop.a", "shop.b")), a_task("shop.b", aliases=("shop.a",))
    for app in apps:
        assert app.tasks["shop.a"] is app.tasks["shop.b"]
    assert len({app.tasks["shop.b"].intent_key(1) for app in apps}) == 1


def test_a_former_name_that_another_task_has() -> None:
    app = a_task("shop.a")
    with pytest.raises(ConfigurationError, match="there is another task of that name"):
        app.task(base=IdempotentTask, shared=False, name="shop.c", intent=("a",), aliases="shop.a")(body)
    assert "shop.c" not in app.tasks
    assert app.tasks["shop.a"].name == "shop.a"
