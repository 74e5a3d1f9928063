"""Tests of lost replies: the write happened, and its caller received an error."""

from __future__ import annotations

import uuid

from celery_idem.core.errors import StoreError
from celery_idem.core.model import MICROSECONDS, Acquired, Done, Fingerprint, Outcome, Policy, Replay, Request
from celery_idem.engine import owners
from celery_idem.engine.ledger import Ledger
from celery_idem.testing.conformance.base import PATIENCE, Suite
from celery_idem.testing.crashing import CrashingStore


class LostReplies(Suite):
    """After a lost reply, the protocol finds out from the store what happened."""

    def test_a_claim_that_meets_its_own_lost_write_has_won(self) -> None:
        ledger, request = self._lost("after create")
        decision, claim = ledger.claim("shop.pay:1", request)
        assert isinstance(decision, Acquired)
        assert claim is not None
        assert claim.attempt == 1
        assert isinstance(claim.settle(Outcome(True, b"j1"), 0.0), Done)

    def test_a_takeover_that_meets_its_own_lost_write_has_won(self) -> None:
        store, ledger, request = self._ledger()
        _, claim = ledger.claim("shop.pay:1", request)
        assert claim is not None
        assert isinstance(claim.release(0.0), Done)
        second = _request()
        _fail(store, "after replace", ledger, second)
        decision, claim = ledger.claim("shop.pay:1", second)
        assert isinstance(decision, Acquired)
        assert claim is not None
        assert claim.attempt == 2

    def test_a_lost_claim_is_taken_up_by_whoever_carries_its_owner(self) -> None:
        ledger, request = self._lost("after create")
        decision, _ = ledger.claim("shop.pay:1", _request())
        assert not isinstance(decision, Acquired)
        decision, claim = ledger.claim("shop.pay:1", _request(carried=(request.owner,)))
        assert isinstance(decision, Acquired)
        assert claim is not None
        assert claim.attempt == 1
        decision, _ = ledger.claim("shop.pay:1", _request(carried=(request.owner,)))
        assert not isinstance(decision, Acquired)  # a second copy of that message

    def test_an_outcome_whose_reply_was_lost_is_there(self) -> None:
        store, ledger, request = self._ledger()
        _, claim = ledger.claim("shop.pay:1", request)
        assert claim is not None
        store.crash("after replace")
        assert isinstance(claim.settle(Outcome(True, b"j1"), PATIENCE), Done)
        decision, _ = ledger.claim("shop.pay:1", _request())
        assert decision == Replay(Outcome(True, b"j1"), own=False)

    def test_a_claim_that_was_never_written_is_free(self) -> None:
        ledger, _ = self._lost("before create")
        decision, _ = ledger.claim("shop.pay:1", _request())
        assert isinstance(decision, Acquired)

    def _ledger(self) -> tuple[CrashingStore, Ledger, Request]:
        store = CrashingStore(self.store)
        return store, Ledger(store, self._prefix.replace(":", "-")), _request()

    def _lost(self, point: str) -> tuple[Ledger, Request]:
        """Return a ledger whose reply to this claim got lost at ``point``."""
        store, ledger, request = self._ledger()
        _fail(store, point, ledger, request)
        return ledger, request


def _fail(store: CrashingStore, point: str, ledger: Ledger, request: Request) -> None:
    store.crash(point)
    try:
        ledger.claim("shop.pay:1", request)
    except StoreError:
        return
    raise AssertionError("no StoreError was raised")


def _request(carried: tuple[bytes, ...] = ()) -> Request:
    day = 86_400 * MICROSECONDS
    policy = Policy(lease=day, result_ttl=day, failure_ttl=day)
    return Request(owners.mint(), str(uuid.uuid4()), Fingerprint(), policy, carried)
