"""What SQLAlchemy and Django tell of an author's transaction: when it has ended, and whether one is open.

Both are recognised by their attributes and not imported.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

Job = Callable[[], None]
"""What to do then. It must not raise: the author's transaction is committed, or is over."""

_JOBS = "celery_idem"
"""The key of waiting jobs in the ``info`` of SQLAlchemy's connections and sessions."""


def after(connection: Any, job: Job) -> None:
    """Call ``job`` soon after the author's transaction has ended. It looks itself whether that was a commit.

    Drivers have no hook for it, so with their own connections it is never called.
    """
    if _is_django(connection):
        if connection.in_atomic_block:
            connection.on_commit(job)
        return
    if _is_session(connection):
        connection = connection.connection()
    if hasattr(connection, "exec_driver_sql"):
        # SQLAlchemy tells of a connection's commit before it is one. Afterwards the connection goes back to its pool,
        # or begins again.
        event = sys.modules["sqlalchemy.event"]  # which is loaded, because the author uses it

        engine = connection.engine
        if not event.contains(engine.pool, "checkin", _checked_in):
            event.listen(engine.pool, "checkin", _checked_in)
            event.listen(engine, "begin", _begun)
        connection.info.setdefault(_JOBS, []).append(job)


def _checked_in(_: object, record: Any) -> None:
    for job in record.info.pop(_JOBS, ()):
        job()


def _begun(connection: Any) -> None:
    for job in connection.info.pop(_JOBS, ()):
        job()


def on_commit(connection: Any, job: Job) -> bool:
    """Call ``job`` after the author's transaction, and not if it is rolled back.

    Args:
        connection: Django's, or a SQLAlchemy session.

    Returns:
        False where it is neither.
    """
    if _is_django(connection):
        connection.on_commit(job)
        return True
    if not _is_session(connection):
        return False
    connection = getattr(
        connection, "registry", lambda: connection
    )()  # of a scoped_session: this thread's session
    event = sys.modules["sqlalchemy.event"]  # which is loaded, because the author uses it

    connection.connection()  # begins, where nothing has begun yet
    if not event.contains(connection, "after_commit", _committed):
        event.listen(connection, "after_commit", _committed)
        event.listen(connection, "after_transaction_end", _ended)
    connection.info.setdefault(_JOBS, []).append([_innermost(connection), job])
    return True


def _innermost(session: Any) -> Any:
    return session.get_nested_transaction() or session.get_transaction()


def _committed(session: Any) -> None:
    """A savepoint's jobs become those of the transaction around it; that of a whole transaction are due."""
    waiting = session.info.get(_JOBS, [])
    done = _innermost(session)
    due = [one for one in waiting if one[0] is done]
    if done.nested:
        for one in due:
            one[0] = done.parent
        return
    session.info[_JOBS] = [one for one in waiting if one[0] is not done]
    for _, job in due:
        job()


def _ended(session: Any, transaction: Any) -> None:
    """What waits for it still is rolled back."""
    waiting = session.info.get(_JOBS)
    if waiting:
        session.info[_JOBS] = [one for one in waiting if one[0] is not transaction]


def _is_django(given: Any) -> bool:
    return hasattr(given, "in_atomic_block") and hasattr(given, "on_commit")


def _is_session(given: Any) -> bool:
    if hasattr(given, "run_sync"):  # an AsyncSession, whose methods are coroutines
        return False
    return hasattr(given, "flush") and callable(getattr(given, "connection", None))


_warned = False


def warn_if_open(name: str) -> None:
    """Warn, once per process, where a call is published inside a transaction of Django's that is not committed."""
    global _warned  # noqa: PLW0603  # once per process
    django = sys.modules.get("django.db")
    if django is None or _warned or not sys.modules["django.conf"].settings.configured:
        return
    for connection in django.connections.all(initialized_only=True):
        blocks = getattr(connection, "atomic_blocks", ())
        if connection.in_atomic_block and not all(getattr(one, "_from_testcase", False) for one in blocks):
            _warned = True
            warnings.warn(
                f"{name} is published inside transaction.atomic(): a worker may run it before the commit, "
                "or although it rolls back. Use task.submit_in(connection, …) or task.submit_on_commit(connection, …).",
                RuntimeWarning,
                stacklevel=4,
            )
            return
