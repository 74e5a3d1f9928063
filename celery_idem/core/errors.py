"""All errors of this package, in one tree.

::

    IdempotencyError
    ├── ConfigurationError      at declaration or start-up; says what to change
    ├── IntentError             an argument cannot be part of an idempotency key
    ├── StoreError              the store did not answer, or not with a record
    ├── LeaseLost               another worker took the intent over
    ├── OutcomeUnknown          in doubt; says how to resolve it
    ├── ResultUnavailable       done, but the value was not stored
    ├── Cancelled               a person cancelled it; it will not run
    └── IntentConflict
        ├── InProgress          another worker is running it (HTTP 409)
        └── FingerprintMismatch same intent, other values   (HTTP 422)

Every attribute is also a positional argument, because ``pickle`` and Celery's JSON result backend rebuild an exception
with ``type(exc)(*exc.args)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = [
    "Cancelled", "ConfigurationError", "FingerprintMismatch", "IdempotencyError", "InProgress",
    "IntentConflict", "IntentError", "LeaseLost", "OutcomeUnknown", "ResultUnavailable", "StoreError",
]  # fmt: skip


class IdempotencyError(Exception):
    """Base of all errors of this package.

    Args:
        message: what happened, and what to do next.
        key: the idempotency key, if there is one.
    """

    key: str | None

    def __init__(self, message: str = "", key: str | None = None, *more: object) -> None:
        super().__init__(message, key, *more)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return self.message


class ConfigurationError(IdempotencyError):
    """A declaration or a setting is wrong. Raised before any work is accepted."""


class IntentError(IdempotencyError):
    """An argument cannot be part of an idempotency key.

    Args:
        parameter: the name of the parameter that holds the value.
    """

    def __init__(self, message: str = "", key: str | None = None, parameter: str | None = None) -> None:
        super().__init__(message, key, parameter)
        self.parameter = parameter


class StoreError(IdempotencyError):
    """The store did not answer in time, or what it answered is not a record."""


class LeaseLost(IdempotencyError):
    """Another worker took this intent over, so this execution must stop."""


class OutcomeUnknown(IdempotencyError):
    """In doubt: the effect may or may not have happened, and the package cannot find out.

    Args:
        reason: why it is unknown.
    """

    def __init__(self, message: str = "", key: str | None = None, reason: str = "") -> None:
        super().__init__(message, key, reason)
        self.reason = reason


class ResultUnavailable(IdempotencyError):
    """The action is done and will not run again, but its result was not stored.

    Args:
        reason: why the result was not stored.
    """

    def __init__(self, message: str = "", key: str | None = None, reason: str = "") -> None:
        super().__init__(message, key, reason)
        self.reason = reason


class Cancelled(IdempotencyError):
    """A person cancelled the action before it was done, and it will not run.

    Args:
        reason: who cancelled it and why, and what was done before that.
    """

    def __init__(self, message: str = "", key: str | None = None, reason: str = "") -> None:
        super().__init__(message, key, reason)
        self.reason = reason


class IntentConflict(IdempotencyError):
    """This call cannot be answered with the stored outcome of its intent."""


class InProgress(IntentConflict):
    """Another worker is running this intent.

    Args:
        retry_after: seconds after which to ask again.
    """

    def __init__(self, message: str = "", key: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, key, retry_after)
        self.retry_after = retry_after


class FingerprintMismatch(IntentConflict):
    """The same intent came again with other values.

    Args:
        differs: names of the parameters that differ; never their values.
    """

    def __init__(self, message: str = "", key: str | None = None, differs: Iterable[str] = ()) -> None:
        self.differs = tuple(differs)
        super().__init__(message, key, list(self.differs))


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Say which extra to install where an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(f"{what}: pip install 'celery_idem[{extra}]'.") from error
