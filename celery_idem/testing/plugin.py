"""The pytest plugin: fixtures with a store in memory, and the option ``--idem-duplicate``.

Fixtures:

``idem_store``
    Puts every guarded task of ``idem_app`` on an empty store in memory for one test.
``idem_clock``
    The clock of that store. ``idem_clock.advance(60)`` makes leases lapse and outcomes expire.
``idem_effects``
    Counts effects. Your fake destination calls ``idem_effects.add("charge", customer)``.
``idem_app``
    The application under test: the ``celery_app`` fixture, or else Celery's current application. You may override it.

``pytest --idem-duplicate`` delivers every task twice in every test, and guarded tasks once more after a crash between
effect and record. A test fails if a counted effect is repeated. Guarded tasks are duplicated wherever they run in the
test's process (``apply``, ``task_always_eager``, a direct call, Celery's ``celery_worker`` fixture). Tasks without a
guard are duplicated only in ``apply`` and eager mode.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from celery_idem.testing.clock import FakeClock

if TYPE_CHECKING:
    from celery import Celery

    from celery_idem.stores.memory import MemoryStore


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("celery_idem").addoption(
        "--idem-duplicate",
        action="store_true",
        help="deliver every Celery task twice, and guarded tasks again after a crash; fail if an effect that "
        "idem_effects counts is repeated",
    )


class RepeatedEffects:
    """Counts the effects at your fake destination."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[Any, ...]] = Counter()

    def add(self, *what: Any) -> None:
        """Count an effect: a name, and values that identify it. All must be hashable."""
        self._counts[what] += 1

    def count(self, *what: Any) -> int:
        """Return how often this effect was counted."""
        return self._counts[what]

    def repeated(self) -> dict[tuple[Any, ...], int]:
        """Return the effects that were counted more than once."""
        return {what: count for what, count in self._counts.items() if count > 1}

    def forget(self, *what: Any) -> None:
        """Remove an effect from the counts: the test intends its repetition."""
        self._counts.pop(what, None)


@pytest.fixture
def idem_app(request: pytest.FixtureRequest) -> Celery:
    """The application under test."""
    try:
        app: Celery = request.getfixturevalue("celery_app")
    except pytest.FixtureLookupError:
        from celery import current_app

        app = current_app._get_current_object()
    return app


@pytest.fixture
def idem_clock() -> FakeClock:
    """The store's clock. It moves only by ``advance``."""
    return FakeClock()


@pytest.fixture
def idem_store(idem_app: Celery, idem_clock: FakeClock) -> Iterator[MemoryStore]:
    """An empty store for every guarded task of the application."""
    from celery_idem.stores.memory import MemoryStore
    from celery_idem.testing.crashing import use_store

    store = MemoryStore(idem_clock)
    url = f"memory://{uuid.uuid4().hex}"
    use_store(url, store)
    before = idem_app.conf.get("idem_store")
    _point(idem_app, url)
    yield store
    _point(idem_app, before)


@pytest.fixture
def idem_effects() -> RepeatedEffects:
    """A counter of effects. With ``--idem-duplicate`` a repeated one fails the test."""
    return RepeatedEffects()


def _point(app: Celery, url: Any) -> None:
    """Make the application, which may already have opened a store, open another one."""
    from celery_idem.integration import wiring

    app.conf.idem_store = url or ""
    wiring._ledgers.pop(app, None)
    for task in app.tasks.values():
        if getattr(task, "idem_declaration", None) is not None:
            type(task)._guard_made = None


# --- --idem-duplicate ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _idem_duplicate(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--idem-duplicate"):
        yield
        return
    app = request.getfixturevalue("idem_app")
    request.getfixturevalue("idem_store")
    clock, effects = request.getfixturevalue("idem_clock"), request.getfixturevalue("idem_effects")
    undo = duplicate(app, clock)
    try:
        yield
    finally:
        undo()
    repeated = effects.repeated()
    if repeated:
        listed = ", ".join(f"{' '.join(map(str, what))} ({count} times)" for what, count in repeated.items())
        pytest.fail(
            f"--idem-duplicate: took effect more than once when its task was delivered again: {listed}",
            pytrace=False,
        )


def duplicate(app: Celery, clock: FakeClock) -> Callable[[], None]:
    """Deliver every task twice from now on, and return a function that stops it."""
    from celery import Task

    from celery_idem.integration.task import IdempotentTask

    guarded, apply = IdempotentTask._run_guarded, Task.apply

    def run_guarded(self: Any, request: Any, args: Any, kwargs: Any) -> Any:
        return _deliver(self, request, args, kwargs, clock)

    def apply_twice(self: Any, *args: Any, **options: Any) -> Any:
        result = apply(self, *args, **options)
        if getattr(self, "idem_declaration", None) is None and not self.name.startswith("celery."):
            apply(
                self,
                *args,
                **{**options, "task_id": result.id, "link": None, "link_error": None, "throw": False},
            )
        return result

    IdempotentTask._run_guarded = run_guarded  # type: ignore[method-assign]
    Task.apply = apply_twice

    def undo() -> None:
        IdempotentTask._run_guarded = guarded  # type: ignore[method-assign]
        Task.apply = apply

    return undo


def _deliver(task: Any, request: Any, args: Any, kwargs: Any, clock: FakeClock) -> Any:
    """Run a delivery whose worker dies after the effect, then one after the lease has lapsed, then a duplicate.

    The outcome of the first is written late, as the protocol allows. The caller receives the first one's result.
    """
    from celery_idem.core.errors import IdempotencyError
    from celery_idem.engine.runner import Runner
    from celery_idem.integration.delivery import Delivery

    class DiesBeforeTheRecord(Runner):
        held: Any = None

        def _settle(self, job: Any, hold: Any, outcome: Any, *more: Any) -> None:
            self.held = (hold, outcome)

    guard = task.guard
    key, fingerprint = guard.identify(request, args, kwargs)
    if task._holds(key):
        return task.run(*args, **kwargs)

    def delivery() -> Any:
        return Delivery(guard, task, request, args, kwargs, key, fingerprint)

    first = DiesBeforeTheRecord(guard.ledger)
    raised: BaseException | None = None
    value = None
    try:
        value = first.run(delivery())
    except BaseException as error:
        raised = error
    if first.held is not None:
        clock.advance(guard.settings.lease + 1)
        for again in (True, False):
            try:
                guard.runner.run(delivery())
            except Exception as error:
                expected = isinstance(error, IdempotencyError) or getattr(error, "idem_replayed", False)
                if not expected and type(error) is not type(raised):
                    raise
            if again:
                hold, outcome = first.held
                hold.settle(outcome, 0.0)  # refused where the second delivery took over
    if raised is not None:
        raise raised
    return value
