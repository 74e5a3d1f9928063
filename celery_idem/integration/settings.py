"""Reads and checks ``idem_*`` in ``app.conf``. ``options`` reads the same settings from tasks.

Every default has its reason. Durations are seconds, as in all of Celery's settings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

from celery_idem.core.errors import ConfigurationError
from celery_idem.core.model import MICROSECONDS, OnCrash, OnLate, Policy
from celery_idem.core.protocol import MAX_CRASHES
from celery_idem.core.sealing import key_bytes

PREFIX = "idem_"

OnDuplicate = Literal["wait", "raise"]
OnStoreError = Literal["retry", "raise", "run"]

_DURABILITY = r"none|fsync|replicas:[1-9][0-9]?"


class Settings:
    """What an application, or one task, has chosen. A value: it cannot be changed, and its ``repr`` shows no secret.

    Not a dataclass, because generating the methods for so many fields takes a hundredth of the time in which Celery is
    imported. Not a named tuple, because error trackers show each item of a tuple, and three of these are secret.

    Attributes:
        store: URL of the store; "" for the Redis result backend.
        namespace: applications with different namespaces do not see each other.
        lease: how long a running claim is valid without a renewal. 30 s: long enough to survive a slow garbage
            collection or a restart of the store, short enough that a dead host's work is decided within half a minute.
        result_ttl: how long an outcome is replayed. A day: as long as Stripe keeps its keys, and longer than the usual
            visibility timeout, ETA or retry horizon.
        failure_ttl: the same for a failed outcome; None: as result_ttl.
        on_duplicate: what a duplicate of a running action does: "wait" for its result, or "raise" InProgress.
        on_crash: what a lapsed lease means (see ``protocol``).
        on_store_error: what to do if the store does not answer before the body: "retry" later, "raise", or "run"
            without a guard.
        max_attempts: crashes allowed before the intent is parked in doubt. 3, as Celery's own max_retries.
        max_result_bytes: larger results are not kept. 1 MiB: ten times a large JSON answer, a thousandth of a small
            Redis.
        durability: what a write waits for: "none", "replicas:N", "fsync".
        shadow: count what would have been collapsed, and block nothing.
        audit: keep digests of the arguments in the record, 6 bytes each, so that ``idem audit`` can say which of them
            vary. On, because it costs microseconds (docs/adr/0007).
        audit_key: a secret key of those digests. Without one, ``secret`` parameters have no digest.
        settle_patience: how long to keep trying to write an outcome. As long as the default lease, after which the
            record has lapsed anyway.
        reconcile_timeout: how long a destination may take to answer. 10 s: a slow API call. The worker's slot is held
            meanwhile.
        scope: the scope of calls without one: a function without arguments, or its path "module:function", which is
            called in the calling process. None: such calls have no scope.
        keep_call: keep the call in the record while the intent is open: arguments, queue and canvas, as in the message.
            Without it nothing can be recovered, and operators see no arguments.
        max_call_bytes: a larger call is not kept. 64 KiB: a hundred times a usual message. A thousand open calls take
            64 MB at most.
        accept_on_publish: ``delay`` and ``apply_async`` accept the call in its record before they publish it, as
            ``submit`` does. Off, because each call costs a write, and Celery's callers expect an error if the broker is
            away.
        recover: publish the call again when its message was lost or its worker died (see docs/how-to/recovery.md).
        late: what a message does that is delivered again after more than ``result_ttl`` and finds no record: "in_doubt"
            or "run". In doubt, because the action may be done and its record expired.
        seal_keys: keys that seal calls, results and errors in records, the newest first. None: every reader of the
            store can read them, and secret values are left out of the call (see docs/how-to/sealing.md).
    """

    store: str = ""
    namespace: str = "idem"
    lease: float = 30.0
    result_ttl: float = 86_400.0
    failure_ttl: float | None = None
    on_duplicate: OnDuplicate = "wait"
    on_crash: OnCrash = "in_doubt"
    on_store_error: OnStoreError = "retry"
    max_attempts: int = 3
    max_result_bytes: int = 1 << 20
    durability: str = "none"
    shadow: bool = False
    audit: bool = True
    audit_key: str = ""
    settle_patience: float = 30.0
    reconcile_timeout: float = 10.0
    scope: Callable[[], Any] | str | None = None
    keep_call: bool = True
    max_call_bytes: int = 65_536
    accept_on_publish: bool = False
    recover: bool = True
    late: OnLate = "in_doubt"
    seal_keys: Sequence[str] = ()

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - DEFAULTS.keys()
        if unknown:
            raise TypeError(f"There is no setting {min(unknown)}.")
        vars(self).update({**DEFAULTS, **given})

    def but(self, **given: Any) -> Settings:
        """Return the same settings, except those that are given."""
        return Settings(**{**vars(self), **given})

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, Settings) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        # Error trackers keep the repr of local variables.
        shown = (f"{name}={value!r}" for name, value in vars(self).items() if name not in _HIDDEN)
        return f"Settings({', '.join(shown)})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"Settings cannot be changed: {name}")

    def policy(self, asks: bool) -> Policy:
        """Return the settings that the protocol needs. ``asks``: the task has a ``reconcile``."""
        keep_failed = self.result_ttl if self.failure_ttl is None else self.failure_ttl
        return Policy(
            lease=int(self.lease * MICROSECONDS),
            result_ttl=int(self.result_ttl * MICROSECONDS),
            failure_ttl=int(keep_failed * MICROSECONDS),
            on_crash=self.on_crash,
            asks=asks,
            max_attempts=self.max_attempts,
            max_step_bytes=self.max_result_bytes,
            late=self.late,
        )


NAMES = tuple(Settings.__annotations__)

DEFAULTS: Mapping[str, Any] = {name: vars(Settings)[name] for name in NAMES}

_HIDDEN = ("store", "audit_key", "seal_keys")
"""Settings whose values no text shows: the URL of a store may have a password."""

_ONE_OF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("shadow", "audit", "keep_call", "accept_on_publish", "recover"), (True, False)),
    "on_duplicate": get_args(OnDuplicate),
    "on_crash": get_args(OnCrash),
    "on_store_error": get_args(OnStoreError),
    "late": get_args(OnLate),
}
_SECONDS = ("lease", "result_ttl", "failure_ttl", "settle_patience", "reconcile_timeout")
LONGEST = 3e9  # seconds, about a century; every store can keep it in microseconds
_SHORTEST_LEASE = 0.1  # seconds; a round trip and a thread switch must fit into a sixth of it


_ALIKE = 0.75
"""Similarity (1: equal) from which a setting's name is offered for a wrong one. One mistake in the shortest name gives
0.8. Names of other things (``timeout``, ``secret``, ``max_retries``) reach 0.73 at most (see the tests' tables)."""


def of_app(conf: Mapping[str, Any]) -> Settings:
    """Return the settings in an application's configuration.

    Raises:
        ConfigurationError: a name or a value is wrong.
    """
    given = {_known(key): conf[key] for key in _ours(conf)}
    for name, value in given.items():
        why = not_allowed(name, value)
        if why:
            raise ConfigurationError(f"{PREFIX}{name} {why}.")
    return Settings(**given)


def _ours(conf: Mapping[str, Any]) -> set[str]:
    """Return the keys with our prefix.

    With Django's namespace, a configuration lists them as ``CELERY_IDEM_…``, and finds them by ``idem_…``.

    Raises:
        ConfigurationError: a key is in capitals, and Celery's rules would ignore it.
    """
    found = set()
    for key in conf:
        if key.startswith(PREFIX):
            found.add(key)
        else:
            before, prefix, name = key.lower().partition(PREFIX)
            if not before and name in NAMES and PREFIX + name not in conf:
                raise ConfigurationError(
                    f"{key} in the configuration does nothing: Celery knows settings in small letters. Write "
                    f"{key.lower()}, or CELERY_{key} where config_from_object has namespace='CELERY'."
                )
            if prefix and before.endswith("_") and PREFIX + name in conf:
                found.add(PREFIX + name)
    return found


def _known(key: str) -> str:
    name = key.removeprefix(PREFIX)
    if name not in NAMES:
        raise ConfigurationError(f"There is no setting {key}.{hint(name)}")
    return name


def hint(name: str, others: tuple[str, ...] = ()) -> str:
    """Return a hint about a name that is no setting: the nearest setting, or all.

    Args:
        others: further names that may be meant, which have no prefix.
    """
    import difflib  # only a mistake needs it

    near = difflib.get_close_matches(name, NAMES + others, n=1, cutoff=_ALIKE)
    if not near:
        return f" There are: {', '.join(PREFIX + one for one in NAMES)}."
    return f" Did you mean {PREFIX if near[0] in NAMES else ''}{near[0]}?"


def not_allowed(name: str, value: Any) -> str:
    """Return why a setting cannot have a value, and what it can be; empty if the value is fine."""
    allowed = _allowed(name, value)
    shown = "this value" if name in _HIDDEN else repr(value)
    return allowed and f"cannot be {shown}: {allowed}"


def _allowed(name: str, value: Any) -> str:
    """Return what is allowed; empty if the value is fine."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name in _ONE_OF:
        options = _ONE_OF[name]
        fits = value in options and (True not in options or isinstance(value, bool))
        return "" if fits else f"use one of {', '.join(map(repr, options))}"
    if name in _SECONDS:
        if name == "failure_ttl" and value is None:
            return ""
        least = _SHORTEST_LEASE if name == "lease" else 0
        fits = number and least <= value <= LONGEST
        return "" if fits else f"use a number of seconds from {least:g} to {LONGEST:g}"
    if name in ("max_attempts", "max_result_bytes", "max_call_bytes"):
        most = MAX_CRASHES if name == "max_attempts" else 512 << 20  # Redis' largest value
        return (
            ""
            if number and isinstance(value, int) and 1 <= value <= most
            else f"use a number from 1 to {most}"
        )
    if name == "durability":
        fits = isinstance(value, str) and re.fullmatch(_DURABILITY, value) is not None
        return "" if fits else 'use "none", "fsync" or "replicas:N"'
    if name == "namespace":
        fits = isinstance(value, str) and value != "" and not {":", "~"} & set(value)
        return "" if fits else "use a short name without a colon or a tilde"  # "~shadow" marks shadow records
    if name == "scope":
        fits = value is None or (isinstance(value, str) and ":" in value) or _takes_nothing(value)
        return "" if fits else 'use a function that takes no arguments, or its path "module:function"'
    if name == "seal_keys":
        fits = isinstance(value, (list, tuple)) and all(map(_is_seal_key, value))
        return (
            ""
            if fits
            else "use a list of keys, each 32, 48 or 64 random bytes in base64 (openssl rand -base64 32)"
        )
    if name == "audit_key":
        return "" if isinstance(value, str) else "use text that cannot be guessed"
    return "" if isinstance(value, str) else "use a URL such as redis://localhost:6379/1"


def _is_seal_key(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(key_bytes(value))
    except ValueError:
        return False


def _takes_nothing(value: Any) -> bool:
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind()
    except TypeError:
        return False
    except ValueError:  # a built-in method without a signature, such as ContextVar.get before Python 3.13
        return True
    return True
