"""A claim that has ended is not brought back by a renewal that runs at the same time.

The model tries every order of an ending and a renewal. Both run in greenlets that stop before each call of the store
and before its reply. Once, at any stop, the store may lose the record, or a reply to the ending may be lost. Another
test runs a thousand endings on a real server.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from greenlet import getcurrent, greenlet

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Acquired, Done, Fingerprint, Outcome, Policy, Request, State, Stored
from celery_idem.core.record import STATE_AT
from celery_idem.engine import claim as claim_module
from celery_idem.engine import events, owners
from celery_idem.engine.claim import Hold
from celery_idem.engine.ledger import Ledger
from celery_idem.stores import open_store
from celery_idem.stores.base import Reply
from celery_idem.stores.memory import MemoryStore

KEY = "shop.charge:0123456789abcdef0123456789abcdef"
STORED = f"idem:{KEY}"
FORGETFUL = Policy(lease=60_000_000, result_ttl=0, failure_ttl=0, on_crash="rerun")

PATIENCE = 600.0
"""Seconds for an ending to reach the store: no pause of the machine is as long. The test itself waits for nothing."""

ENDINGS: dict[str, tuple[Callable[[Hold], object], State | None]] = {
    "settled": (lambda hold: hold.settle(Outcome(True, b"j1"), PATIENCE), None),
    "failed": (lambda hold: hold.settle(Outcome(False, b"j1"), PATIENCE), None),
    "released": (lambda hold: hold.release(1.0), None),
    "scheduled": (lambda hold: hold.schedule(60.0, PATIENCE), State.SCHEDULED),
    "in doubt": (lambda hold: hold.doubt("why", PATIENCE), State.IN_DOUBT),
    "exited": (lambda hold: hold.exit("why", PATIENCE), State.RUNNING),
}
"""How a claim may end, and the state of its record afterwards. None: the record is deleted, as it is kept for 0 s."""


class Stopping(MemoryStore):
    """A memory store that stops before each call and before its reply."""

    def __init__(self) -> None:
        super().__init__()
        self.stop: Callable[[str], str] = lambda where: "go"

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        return self._stopping(lambda: super(Stopping, self).create(key, value, ttl, due))

    def read(self, key: str) -> Reply:
        return self._stopping(lambda: super(Stopping, self).read(key))

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        return self._stopping(lambda: super(Stopping, self).replace(key, old, value, ttl, due))

    def _stopping(self, call: Callable[[], Reply]) -> Reply:
        self.stop("before")
        reply = call()
        if self.stop("after") == "lose":
            raise StoreError("the reply got lost")
        return reply


class ModelLock:
    """The claim's lock. A greenlet that does not get it waits."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.held = False

    def __enter__(self) -> None:
        if self.held:
            self.world.stop("locked")
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False


class World:
    """One run of an ending and a renewal of one claim. It makes the choices of ``path``, then always the first."""

    def __init__(self, ending: str, path: list[int]) -> None:
        self.path = path
        self.sizes: list[int] = []
        self.trace: list[str] = []
        self.store = Stopping()
        self.lock = ModelLock(self)
        ledger = Ledger(self.store)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "Lock", lambda: self.lock)
            decision, hold = ledger.claim(KEY, Request(b"owner-12-byt", "t1", Fingerprint(), FORGETFUL))
        assert isinstance(decision, Acquired)
        assert hold is not None
        self.hub = getcurrent()
        self.lets = {
            "body": greenlet(lambda _: ENDINGS[ending][0](hold)),
            "renewer": greenlet(lambda _: hold.renew()),
        }
        self.at = dict.fromkeys(self.lets, "start")
        self.faults = 1

    def run(self) -> Stored | None:
        """Run both to their end, and return what the store holds."""
        self.store.stop = self.stop
        while self.at:
            choices = [
                (name, "go") for name, where in self.at.items() if where != "locked" or not self.lock.held
            ]
            if self.faults:
                choices.append(("", "forget"))
                choices += [
                    (name, "lose") for name, where in self.at.items() if (name, where) == ("body", "after")
                ]
            name, what = choices[self.choose(len(choices))]
            self.trace.append(f"{name} {what}, {self.at.get(name, '')}")
            self.faults -= what != "go"
            if what == "forget":
                self.store._values.pop(STORED, None)
                continue
            self.lets[name].switch(what)
            if self.lets[name].dead:
                del self.at[name]
        return self.store._held(STORED, self.store._clock())

    def choose(self, size: int) -> int:
        if len(self.sizes) == len(self.path):
            self.path.append(0)
        self.sizes.append(size)
        return self.path[len(self.sizes) - 1]

    def stop(self, where: str) -> str:
        me = next(name for name, let in self.lets.items() if let is getcurrent())
        self.at[me] = where
        told: str = self.hub.switch()
        return told


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_order_of_an_ending_and_a_renewal_brings_the_hold_back(
    ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "PAUSES", (0.0,))
    monkeypatch.setattr(events, "emit", lambda kind, key, **details: None)
    path: list[int] = []
    runs = 0
    while True:
        world = World(ending, path)
        left = world.run()
        state = State(left.value[STATE_AT]) if left is not None else None
        # There is no record either if the store lost it after the ending wrote it.
        assert state == ENDINGS[ending][1] or (state is None and " forget, " in world.trace), world.trace
        runs += 1
        while path and path[-1] + 1 >= world.sizes[len(path) - 1]:
            path.pop()
        if not path:
            break
        path[-1] += 1
    assert runs > 100


@pytest.mark.redis
def test_renewals_beside_a_thousand_outcomes_leave_nothing(redis_url: str) -> None:
    store = open_store(redis_url)
    ledger = Ledger(store)
    met_nothing = 0
    current: list[Hold] = []
    done = threading.Event()

    def renew() -> None:
        nonlocal met_nothing
        while not done.is_set():
            for claim in current[-1:]:
                met_nothing += claim.renewal() is None
                claim.renew()

    renewer = threading.Thread(target=renew)
    renewer.start()
    try:
        for n in itertools.count():
            if n >= 1000 and met_nothing > 100:  # how often both run at the same time depends on the machine
                break
            request = Request(owners.mint(), "task", Fingerprint(), FORGETFUL)
            decision, claim = ledger.claim(f"{KEY}{n}", request)
            assert isinstance(decision, Acquired)
            assert claim is not None
            current[:] = [claim]
            assert isinstance(claim.settle(Outcome(n % 2 == 0, b"j1"), 0.0), Done)
    finally:
        done.set()
        renewer.join(20.0)
    assert list(ledger.list()) == []
