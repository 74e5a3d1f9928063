"""The doctor's visit when a worker starts: what can be seen in the configuration, and whether the stores answer."""

from __future__ import annotations

import threading
import time
from typing import Any

from celery import bootsteps

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.engine import events
from celery_idem.engine.ledger import Ledger
from celery_idem.operate.doctor import CHEAP, examine, gather
from celery_idem.operate.doctor.gathering import version
from celery_idem.operate.operators import Desk

POOLS = {"thread": "threads"}
"""Pools whose module has another name than ``--pool`` takes."""

WITHIN = 10.0
"""Seconds after which a check that is not done is spoken of. A store's call may take twice its timeout of 5 s."""


class AtStart(bootsteps.StartStopStep):  # type: ignore[misc]
    """Looks when a worker starts, beside it: whatever it meets, the worker neither waits nor stops.

    After the pool, because a child must not be forked while a thread imports or holds a lock.
    """

    requires = ("celery.worker.components:Pool",)

    def start(self, parent: Any) -> None:
        module = str(getattr(parent.pool_cls, "__module__", "")).rpartition(".")[2]
        look = (parent.app, POOLS.get(module, module))
        try:
            threading.Thread(target=_look, args=look, name="celery_idem doctor", daemon=True).start()
        except RuntimeError as error:  # no thread to be had
            events.logger.warning("celery_idem: the checks at the start were left out: %s", error)


def _look(app: Any, pool: str) -> None:
    _bounded("The checks of the configuration", lambda: _check(app, pool))
    try:
        ledgers = Desk(app).ledgers()
    except Exception:  # said by the first check
        return
    for ledger in ledgers:
        _bounded(f"The store {ledger.store.url}", lambda ledger=ledger: _try_store(ledger))


def _bounded(what: str, call: Any) -> None:
    """Run a check; say so when it fails, and as soon as it takes too long."""
    late = threading.Timer(
        WITHIN, events.logger.warning, ("celery_idem: %s: nothing to be heard of it after %g s", what, WITHIN)
    )
    late.daemon = True
    late.start()
    try:
        call()
    except ConfigurationError as error:
        events.logger.error("celery_idem: %s", error)
    except Exception:
        events.logger.warning("celery_idem: %s: failed; tasks are guarded all the same", what, exc_info=True)
    finally:
        late.cancel()


def _check(app: Any, pool: str) -> None:
    for finding in examine(gather(app, ask=False, pool=pool), CHEAP):
        if finding.severity != "note":
            log = events.logger.error if finding.severity == "error" else events.logger.warning
            log("%s: %s: %s -> %s", finding.code, finding.where, finding.wrong, finding.change)


def _try_store(ledger: Ledger) -> None:
    """One line on a store: that it answers, or what to do."""
    store = ledger.store
    began = time.perf_counter()
    try:
        store.read(f"{ledger.namespace}:")
    except StoreError as error:
        events.logger.warning(
            "celery_idem: %s Until it answers no guarded task runs (idem_on_store_error). Start it, or set idem_store "
            "to where it is; `celery idem doctor` looks closer.",
            error,
        )
        return
    took = (time.perf_counter() - began) * 1000
    prefix = getattr(store, "prefix", "")
    about = [version(store), f"prefix {prefix!r}" if prefix else "", f"namespace {ledger.namespace!r}"]
    events.logger.info(
        "celery_idem: store %s answered in %.0f ms (%s)", store.url, took, ", ".join(filter(None, about))
    )
