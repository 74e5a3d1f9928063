"""Workers delete expired rows and nothing else, in small batches, while other workers do the same."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest
from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS
from celery_idem.integration import looks, purging
from celery_idem.integration.purging import Purger
from celery_idem.stores import open_store
from celery_idem.stores.base import Store
from celery_idem.stores.memory import MemoryStore
from tests.celery.conftest import Kind, start
from tests.conftest import running
from tests.support.servers import RedisServer
from tests.support.waiting import wait_for

VALUE = b"owner-mine--" + b"value"
SOON = 30.0

stores = pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(purging, "FIRST", 0.01)
    monkeypatch.setattr(purging, "EVERY", 0.1)
    monkeypatch.setattr(purging, "BATCH", 50)


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/idem.db"
    postgres: str = request.getfixturevalue("postgres_url")
    return postgres


@pytest.fixture
def purgers() -> Iterator[list[Purger]]:
    made: list[Purger] = []
    yield made
    for purger in made:
        purger.stop()


def fill(store: Store, expired: int) -> set[str]:
    """Creates `expired` expired rows, and some others, whose keys it returns."""
    for n in range(expired):
        store.create(f"gone-{n}", VALUE, 1)
    store.create("kept for an hour", VALUE, 3600 * MICROSECONDS)
    store.create("evidence", VALUE)
    return {"kept for an hour", "evidence"}


def keys(url: str) -> set[str]:
    """The keys in the table, expired or not."""
    import sqlalchemy as sa

    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.connect() as connection:
            found = {key for (key,) in connection.exec_driver_sql("SELECT key FROM celery_idem")}
            return {key for key in found if "~" not in key}  # a key with ~ is a worker's note about itself
    finally:
        engine.dispose()


@stores
def test_two_workers_delete_what_has_expired_and_nothing_else(url: str, purgers: list[Purger]) -> None:
    left = fill(open_store(url), 230)
    assert len(keys(url)) == 232
    for _ in range(2):
        store = open_store(url)  # each worker has its own
        purgers.append(Purger(lambda store=store: [store]))
        purgers[-1].start()
    wait_for(lambda: keys(url) == left, SOON, lambda: f"only {left} to be there, not {len(keys(url))} rows")
    open_store(url).create("later", VALUE, 1)
    wait_for(lambda: keys(url) == left, SOON, "the later row to be deleted")


@pytest.mark.postgres
def test_it_waits_for_nobody(postgres_url: str, purgers: list[Purger]) -> None:
    store = open_store(postgres_url)
    left = fill(store, 120)
    with psycopg.connect(postgres_url) as other:
        other.execute("SELECT 1 FROM celery_idem WHERE key = 'gone-7' FOR UPDATE")
        purgers.append(Purger(lambda: [store]))
        purgers[0].start()
        wait_for(lambda: keys(postgres_url) == {*left, "gone-7"}, SOON, "all but the locked row to go")
        other.rollback()
    wait_for(lambda: keys(postgres_url) == left, SOON, "the locked row to go")


def test_a_store_that_fails_is_tried_again_and_a_backlog_is_not_done_in_one_go(purgers: list[Purger]) -> None:
    class Failing(MemoryStore):
        asked: list[int] = []  # noqa: RUF012

        def purge(self, limit: int) -> int:
            self.asked.append(limit)
            if len(self.asked) == 1:
                raise StoreError("away")
            return super().purge(limit)

    store = Failing()
    fill(store, 120)
    purgers.append(Purger(lambda: [store]))
    purgers[0].start()
    wait_for(lambda: len(store.asked) >= 5, SOON, "a failure, three batches and the next look")
    assert set(store.asked) == {50}
    assert len(store._values) == 2


def test_no_process_is_forked_in_the_middle_of_a_statement(
    purgers: list[Purger], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child would inherit locks that no thread releases. A statement that hangs delays a fork only for a moment."""
    monkeypatch.setattr(looks, "FORK_WAITS", 0.2)
    within, go = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def purge(self, limit: int) -> int:
            within.set()
            assert go.wait(SOON)
            return 0

    purgers.append(Purger(lambda: [Slow()]))
    purgers[0].start()
    assert within.wait(SOON)
    began = time.monotonic()
    assert forked(lambda: looks.FORKS.held_off.acquire(timeout=1)) == 0
    assert time.monotonic() - began >= 0.2
    go.set()
    wait_for(lambda: forked(lambda: True) == 0, SOON, "forks to work again")


def forked(check: Callable[[], bool]) -> int:
    """The exit status of a child that calls `check`."""
    child = os.fork()
    if child == 0:  # pragma: no cover
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def app_with(url: str) -> Celery:
    app = Celery("purged", broker="memory://", set_as_current=False)
    app.conf.idem_store = url

    @app.task(name="t", base=IdempotentTask, intent=("n",), shared=False)
    def t(n: int) -> int:
        return n

    return app


def test_a_store_that_expires_by_itself_has_no_thread(tmp_path: Path) -> None:
    redis, sqlite = app_with("redis://127.0.0.1:1"), app_with(f"sqlite:///{tmp_path}/idem.db")
    wrong = app_with("nonsense://")
    before = set(threading.enumerate())
    purging.BESIDE.begin(SimpleNamespace(app=redis))
    purging.BESIDE.begin(SimpleNamespace(app=wrong))
    assert not set(threading.enumerate()) - before  # threads of earlier tests may still be ending
    for _ in range(2):  # a worker that connects again to its broker gets ready twice
        purging.BESIDE.begin(SimpleNamespace(app=sqlite))
    (thread,) = set(threading.enumerate()) - before
    assert thread.name == "celery_idem purging"
    for _ in range(2):
        purging.BESIDE.end(SimpleNamespace(app=sqlite))
    thread.join(SOON)
    assert not thread.is_alive()


@pytest.mark.redis
def test_a_real_worker(tmp_path: Path) -> None:
    """A worker deletes expired rows within seconds of its start, with the default times."""
    url = f"sqlite:///{tmp_path}/idem.db"
    left = fill(open_store(url), 10)
    with running(lambda: RedisServer(tmp_path / "redis")) as redis:
        stage = start(
            Kind("prefork", "redis", False, 1), redis.url, redis.url_for(1), tmp_path, idem_store=url
        )
        try:
            wait_for(lambda: keys(url) == left, SOON, stage.worker.log_tail)
            assert stage.pay.delay("a").get(timeout=SOON) == {"paid": 5, "of": ["a"]}
        finally:
            stage.worker.stop()
            stage.app.close()
