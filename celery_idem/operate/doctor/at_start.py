"""The checks that a worker runs when it starts: its configuration, and whether its stores answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from celery import bootsteps

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.engine import events
from celery_idem.engine.ledger import Ledger
from celery_idem.integration.looks import FORKS, Looks
from celery_idem.operate.doctor import CHEAP, declared, examine, gather, servers
from celery_idem.operate.doctor.asking import infos, run_of, version
from celery_idem.operate.doctor.configuration import NOT_A_SETTING
from celery_idem.operate.doctor.stores import meanwhile
from celery_idem.operate.operators import Operator

POOLS = {"thread": "threads"}
"""Names for ``--pool`` of pools whose module has another name."""

WITHIN = 10.0
"""Seconds after which a check that has not ended is reported. A store's call may take twice its timeout of 5 s."""

EVERY = 60.0
"""Seconds between checks of the note. A check is one read, and a loss is known before most callers call again."""

LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}


class AtStart(bootsteps.StartStopStep):  # type: ignore[misc]
    """Runs the checks in threads. The worker does not wait for them, and does not stop because of them.

    They run after the pool has started, because it must not fork while a thread imports or holds a lock.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._watches: list[Watch] = []

    def start(self, parent: Any) -> None:
        module = str(getattr(parent.pool_cls, "__module__", "")).rpartition(".")[2]
        app, pool = parent.app, POOLS.get(module, module)
        _beside("The checks of the configuration", lambda: _check(app, pool))
        _beside("Opening the stores", lambda: _try_stores(app, self._watches))

    def stop(self, parent: Any) -> None:
        for watch in self._watches:
            watch.stop()


def _beside(what: str, check: Callable[[], None]) -> None:
    """Run a check in a separate thread. Log when it fails, and as soon as it takes too long."""
    late = threading.Timer(
        WITHIN, events.diagnose, (logging.WARNING, "%s: no answer after %g s", what, WITHIN)
    )
    late.daemon = True

    def run() -> None:
        try:
            check()
        except ConfigurationError as error:
            events.diagnose(logging.ERROR, "%s", error)
        except BaseException as error:  # an application's own code may even exit
            events.diagnose(logging.WARNING, "%s: failed. Tasks are guarded all the same.", what, error=error)
        finally:
            late.cancel()

    try:
        late.start()
        threading.Thread(target=run, name="celery_idem doctor", daemon=True).start()
    except RuntimeError as error:  # no more threads
        events.diagnose(logging.WARNING, "%s: left out: %s", what, error)


def _check(app: Any, pool: str) -> None:
    for found in examine(gather(app, ask=False, pool=pool), CHEAP):
        if found.severity != "note" or found.code == NOT_A_SETTING:
            events.diagnose(
                LEVELS[found.severity], "%s: %s: %s -> %s", found.code, found.where, found.wrong, found.change
            )


def _try_stores(app: Any, watches: list[Watch]) -> None:
    try:
        ledgers = Operator(app).ledgers()
    except ConfigurationError:  # the check of the configuration reports it
        return
    for ledger in ledgers:
        _beside(f"The store {ledger.store.url}", lambda ledger=ledger: _try_store(app, ledger, watches))  # type: ignore[misc]


def _try_store(app: Any, ledger: Ledger, watches: list[Watch]) -> None:
    """Log one line about a store: that it answers, or what to do. Then note what is known of it."""
    store = ledger.store
    began = time.perf_counter()
    try:
        store.read(f"{ledger.namespace}:")
    except StoreError as error:
        guards = {name: task.guard for name, task in Operator(app).tasks().items()}
        its = {name: guard.settings for name, guard in guards.items() if guard.ledger.store is store}
        events.diagnose(
            logging.WARNING,
            "%s %s Start it, or set idem_store to where it is; `celery idem doctor` tells more.",
            error,
            meanwhile(its),
        )
        return
    took = (time.perf_counter() - began) * 1000
    prefix = getattr(store, "prefix", "")
    about = [version(store), f"prefix {prefix!r}" if prefix else "", f"namespace {ledger.namespace!r}"]
    events.diagnose(
        logging.INFO, "store %s answered in %.0f ms (%s)", store.url, took, ", ".join(filter(None, about))
    )
    try:
        with FORKS.held_off:
            declared.keep(ledger, Operator(app).tasks())
            watch = Watch(ledger)
    except StoreError as error:
        events.diagnose(logging.WARNING, "what `idem doctor` compares with cannot be noted: %s", error)
        return
    if not store.url.startswith("memory"):
        watches.append(watch)
        watch.start()


class Watch(Looks):
    """Notes the runs of a server, and checks that the note still exists. It is lost only together with all records.

    Raises:
        StoreError: the store did not answer, or refused.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__("looking after the store's note", self._look_after, EVERY, EVERY)
        self._ledger = ledger
        self._sees = True
        run = self._run()
        self._sees = bool(run)  # a refused question is a line in the server's log: not one each minute
        self._born, _ = servers.note(ledger, run, "")

    def _run(self) -> dict[str, Any]:
        try:
            return run_of(infos(self._ledger.store)) if self._sees else {}
        except StoreError:  # a user with the least rights
            return {}

    def _look_after(self, _: threading.Event) -> None:
        try:
            with FORKS.held_off:
                run = self._run()
                if servers.unchanged(self._ledger, self._born, run):
                    return
                self._born, lost = servers.note(self._ledger, run, self._born)
        except StoreError:  # the tasks report it
            return
        if lost:
            events.diagnose(
                logging.ERROR,
                "the store %s has lost its data: every action from before is forgotten, and runs again when it is "
                "called again. Compare the destination; `celery idem doctor` says what to change.",
                self._ledger.store.url,
            )
