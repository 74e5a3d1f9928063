"""Hooks into an author's transaction of SQLAlchemy or Django: when it has ended, and whether one is open.

Both are recognised by their attributes, without importing them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

Job = Callable[[], None]
"""Called after the transaction. It must not raise, because the author's transaction has ended."""

_JOBS = "celery_idem"
"""The key of waiting jobs in the ``info`` of SQLAlchemy's connections and sessions."""


def after(connection: Any, job: Job) -> None:
    """Call ``job`` soon after the author's transaction has ended. ``job`` has to find out whether it has committed.

    A driver's own connection has no such hook, so ``job`` is never called there.
    """
    if _is_django(connection):
        if connection.in_atomic_block:
            connection.on_commit(job)
        return
    if _is_session(connection):
        connection = connection.connection()
    if hasattr(connection, "exec_driver_sql"):
        # SQLAlchemy's commit event of a connection comes before the commit. After the commit, the connection returns to
        # its pool, or begins again.
        _listen(connection.engine.pool, "checkin", _checked_in)
        _listen(connection.engine, "begin", _begun)
        connection.info.setdefault(_JOBS, []).append(job)


def _listen(target: Any, name: str, hook: Callable[..., None]) -> None:
    """Have SQLAlchemy call ``hook`` at an event of ``target``, once.

    ``event.contains`` is not asked, because it goes by ``id(target)``. It keeps that of a pool that ``Engine.dispose``
    has replaced, and another engine's pool may get the same ``id``. The new pool has the old one's hooks.
    """
    if hook not in getattr(target.dispatch, name):
        event = sys.modules["sqlalchemy.event"]  # the author uses it, so it is loaded
        event.listen(target, name, hook)


def _checked_in(_: object, record: Any) -> None:
    for job in record.info.pop(_JOBS, ()):
        job()


def _begun(connection: Any) -> None:
    for job in connection.info.pop(_JOBS, ()):
        job()


def on_commit(connection: Any, job: Job) -> bool:
    """Call ``job`` after the author's transaction has committed, and not if it is rolled back.

    Args:
        connection: Django's connection, or a SQLAlchemy session.

    Returns:
        False for any other connection.
    """
    if _is_django(connection):
        connection.on_commit(job)
        return True
    if not _is_session(connection):
        return False
    session = connection.registry() if hasattr(connection, "registry") else connection  # for a scoped_session
    session.connection()  # begins a transaction, if there is none
    _listen(session, "after_commit", _committed)
    _listen(session, "after_transaction_end", _ended)
    session.info.setdefault(_JOBS, []).append([_innermost(session), job])
    return True


def _innermost(session: Any) -> Any:
    return session.get_nested_transaction() or session.get_transaction()


def _committed(session: Any) -> None:
    """Call the jobs of a transaction. Those of a savepoint become jobs of the transaction around it."""
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
    """Drop the jobs that still wait for a transaction that has ended: it was rolled back."""
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
    """Warn, once per process, if a call is published inside an open transaction of Django."""
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
