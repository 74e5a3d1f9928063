"""Runner jobs without Celery, and a runner in memory to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery_idem.core.model import MICROSECONDS, Answer, Busy, Fingerprint, Policy, Raised, State
from celery_idem.engine import events
from celery_idem.engine.claim import Hold
from celery_idem.engine.ledger import Ledger
from celery_idem.engine.runner import Job, Options, Runner, Why
from celery_idem.stores.memory import MemoryStore
from celery_idem.testing import CrashingStore, FakeClock

KEY = "shop.pay:0123456789abcdef0123456789abcdef"
LEASE = 30 * MICROSECONDS
DAY = 86_400 * MICROSECONDS


class Left(Exception):
    """Raised by `come_back`, like Celery's Retry."""


class Ended(BaseException):
    """Raised by a body to end in a given way, `kind`."""

    def __init__(self, kind: Raised) -> None:
        super().__init__(kind)
        self.kind = kind


class Failed(Exception):
    pass


class FakeJob(Job):
    """A job. `body` is the result, an exception to raise, or a function of the claim."""

    def __init__(
        self,
        body: Any = "done",
        *,
        ask: Any = None,
        must_match: bytes = b"",
        carried: tuple[bytes, ...] = (),
        task_id: str = "one",
        wait: Callable[[], None] | None = None,
        delay: float = 5.0,
        **options: Any,
    ) -> None:
        policy = Policy(LEASE, DAY, DAY, options.pop("on_crash", "in_doubt"), asks=ask is not None)
        fingerprint = Fingerprint(("cents",), b"tag." + must_match.ljust(8)) if must_match else Fingerprint()
        super().__init__(KEY, task_id, fingerprint, Options(policy, **{"patience": 0.0, **options}), carried)
        self._body = body
        self._answer = ask
        self._wait = wait
        self._delay = delay
        self.ran = 0
        self.claims: list[Hold] = []
        self.came_back: list[tuple[float, tuple[bytes, ...], Why]] = []

    def body(self, hold: Hold) -> Any:
        self.entered = True
        self.ran += 1
        self.claims.append(hold)
        if isinstance(self._body, BaseException):
            raise self._body
        return self._body(hold) if callable(self._body) else self._body

    def kind_of(self, error: BaseException) -> Raised:
        return error.kind if isinstance(error, Ended) else Raised.ERROR

    def retry_delay(self, error: BaseException) -> float:
        return self._delay

    def ask(self, hold: Hold) -> Answer:
        answer: Answer = self._answer() if callable(self._answer) else self._answer
        return answer

    def said(self) -> Any:
        return "said" if self._body.kind is Raised.SAID_DONE else Failed("said")

    def follow(self, task_id: str) -> tuple[bool, Any]:
        return True, f"of {task_id}"

    def come_back(
        self, seconds: float, carried: tuple[bytes, ...], why: Why, says: str, busy: Busy | None = None
    ) -> None:
        self.came_back.append((seconds, carried, why))
        if self._wait is None:
            raise Left(says)
        self._wait()


class Bench:
    """A runner with its store, clock and events."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.store = CrashingStore(MemoryStore(self.clock))
        self.ledger = Ledger(self.store)
        self.runner = Runner(self.ledger)
        self.events: list[events.Event] = []

    def run(self, body: Any = "done", **options: Any) -> Any:
        return self.runner.run(FakeJob(body, **options))

    @property
    def state(self) -> State | None:
        entry = self.ledger.get(KEY)
        return entry.record.state if entry else None

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def lapse(self) -> None:
        self.clock.advance(31)
