"""Copies records from one store to another: completely, repeatably, and without overwriting newer ones."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from celery_idem.core.errors import ConfigurationError
from celery_idem.core.model import (
    MICROSECONDS,
    Acquired,
    Busy,
    Fingerprint,
    InDoubt,
    Outcome,
    Policy,
    Replay,
    Request,
)
from celery_idem.engine import owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.ledger import Ledger
from celery_idem.operate.copying import Copied, copy
from celery_idem.stores import open_store

DAY = 86_400 * MICROSECONDS
DONE = Outcome(True, b"j1")


def request(lease: int = DAY) -> Request:
    return Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), Policy(lease, DAY, DAY))


def claim(ledger: Ledger, key: str, lease: int = DAY) -> Hold:
    decision, claimed = ledger.claim(key, request(lease))
    assert isinstance(decision, Acquired)
    assert claimed is not None
    return claimed


def opened(url: str) -> Ledger:
    return Ledger(open_store(url), "shop")


@pytest.fixture
def source() -> Ledger:
    return opened(f"memory://{uuid.uuid4()}")


@pytest.fixture
def target(tmp_path: Path) -> Ledger:
    return opened(f"sqlite:///{tmp_path}/idem.db")


def test_every_state_arrives(source: Ledger, target: Ledger) -> None:
    claim(source, "a:done").settle(DONE, 0.0)
    running = claim(source, "a:running")
    claim(source, "a:doubt").doubt("who knows", 0.0)
    claim(source, "a:free").release(0.0)
    source.store.create("other:a", b"another application's".ljust(40))
    source.store.create("shop:not ours", b"x" * 50)
    reports: list[Copied] = []
    counts = copy(source, target, reports.append)
    assert counts == Copied(seen=5, written=4, unreadable=1) == reports[-1]
    assert target.claim("a:done", request())[0] == Replay(DONE, own=False)
    assert isinstance(target.claim("a:running", request())[0], Busy)
    assert isinstance(target.claim("a:doubt", request())[0], InDoubt)
    before = source.get("a:free")
    after = claim(target, "a:free")
    assert before is not None
    assert after.fence > before.record.fence  # fences go on growing
    assert after.attempt == 2
    there = target.get("a:running")
    assert there is not None
    assert there.record.fence == running.fence
    assert target.store.read("other:a").stored is None


def test_run_again_it_goes_on_and_brings_up_to_date(source: Ledger, target: Ledger) -> None:
    running = claim(source, "a:running")
    claim(source, "a:done").settle(DONE, 0.0)
    copy(source, target)
    assert copy(source, target) == Copied(seen=2, there=2)
    running.settle(DONE, 0.0)
    claim(source, "a:new")
    assert copy(source, target) == Copied(seen=3, written=2, there=1)
    assert target.claim("a:running", request())[0] == Replay(DONE, own=False)


def test_stopped_half_way_it_can_be_run_again(source: Ledger, target: Ledger) -> None:
    for n in range(450):
        claim(source, f"a:{n}").settle(DONE, 0.0)

    def stop(counts: Copied) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(source, target, stop)
    assert copy(source, target) == Copied(seen=450, written=250, there=200)
    assert len(list(target.list())) == 450


def test_what_moved_on_in_the_target_stays(source: Ledger, target: Ledger) -> None:
    held = claim(source, "a:taken over", lease=0)
    copy(source, target)
    for _ in range(2):  # in the target it gets in doubt, is resolved by a person, and runs again
        target.claim("a:taken over", request())
    from celery_idem.core.model import NotHappened

    target.resolve("a:taken over", NotHappened(), by="me")
    again = claim(target, "a:taken over")
    held.settle(DONE, 0.0)
    assert copy(source, target) == Copied(seen=1, there=1)
    there = target.get("a:taken over")
    assert there is not None
    assert there.record.fence == again.fence
    again.settle(Outcome(True, b"j2"), 0.0)
    assert copy(source, target) == Copied(seen=1, there=1)
    assert target.claim("a:taken over", request())[0] == Replay(Outcome(True, b"j2"), own=False)


def test_outcomes_keep_what_is_left_of_their_time(tmp_path: Path) -> None:
    store = open_store(f"memory://{uuid.uuid4()}")
    brief = Ledger(store, "shop", None, lambda task: 0.0 if task.startswith("brief") else 3600.0)
    for key in ("brief:1", "long:1"):
        claim(brief, key).settle(DONE, 0.0)
    target = opened(f"sqlite:///{tmp_path}/idem.db")
    assert copy(brief, target) == Copied(seen=2, written=1, expired=1)
    [(expires, stamp)] = target.store._rows("SELECT expires, stamp FROM celery_idem", {})  # type: ignore[attr-defined]
    assert 3500 * MICROSECONDS < expires - stamp <= 3600 * MICROSECONDS


def test_namespaces_must_be_equal(source: Ledger) -> None:
    with pytest.raises(ConfigurationError, match="namespaces"):
        copy(source, Ledger(open_store("memory://x"), "another"))


def test_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\n"
        "from celery_idem import IdempotentTask\n"
        f"app = Celery('shop', broker='memory://')\napp.conf.idem_store = 'sqlite:///{tmp_path}/old.db'\n"
        "@app.task(base=IdempotentTask, intent=('n',))\ndef pay(n): return n\n"
    )

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    run("-c", "import shop; [shop.pay.apply((n,)).get() for n in range(3)]")
    idem = ("-m", "celery", "-A", "shop", "idem")
    copied = run(*idem, "copy", f"sqlite:///{tmp_path}/old.db", f"sqlite:///{tmp_path}/new.db", "--yes")
    assert "3 records seen: 3 written" in copied
    assert "CREATE TABLE IF NOT EXISTS celery_idem" in run(*idem, "schema", "sqlite")
    assert len(list(Ledger(open_store(f"sqlite:///{tmp_path}/new.db")).list())) == 3
