"""Messages that continue an intent: its retry, or the same message published again.

Such a message carries the key and the fingerprint of the intent, even if the body has changed its arguments. A retry
with other arguments is another intent if the body publishes it without raising it (``throw=False``; docs/adr/0016).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.app.task import Context
from celery.exceptions import Retry
from celery.utils import uuid

from celery_idem.core import keys
from celery_idem.core.errors import ConfigurationError
from celery_idem.core.model import CALLER_KEY, FINGERPRINT, KEY, MESSAGE, Fingerprint
from celery_idem.engine.claim import Hold, Retries
from celery_idem.integration.delivery import DOUBTFUL
from celery_idem.integration.guarded import GuardedTask

if TYPE_CHECKING:
    from celery.canvas import Signature

SAME_INTENT = "idem_same_intent"
"""Option of a signature: its key header counts, whatever its arguments."""

MAYBE_APART = "idem_maybe_apart"
"""Option of a retry that may be another action: a tuple with the error that caused the retry."""

_OF_ITS_CANVAS = ("chain", "chord", "group_id", "group_index", "link", "reply_to")
"""Options that belong to the result of the body itself."""


class AlreadyComing(Exception):
    """The same retry is already published."""


def retries_of(claim: Hold) -> Retries:
    """Return the retries that an execution has published."""
    if claim.retries is None:
        claim.retries = Retries()
    return claim.retries


def identity_of(task: GuardedTask, request: Context) -> tuple[str, Fingerprint]:
    """Return the key and fingerprint of a request's intent."""
    claim: Hold | None = getattr(request, "idem_claim", None)
    if claim is not None:
        return claim.key, claim.fingerprint
    return task.guard.identify(request, request.args, request.kwargs)


def continue_intent(task: GuardedTask, request: Context, signature: Signature) -> None:
    """Mark a signature that was made from a request, so that its message continues the same intent."""
    key, fingerprint = identity_of(task, request)
    headers = signature.options.get("headers") or {}
    signature.options["headers"] = {
        **{name: value for name, value in headers.items() if name not in keys.IDENTITY},
        **_labels(request),
        KEY: key,
        FINGERPRINT: fingerprint.packed.hex(),
    }
    signature.options[SAME_INTENT] = True


def shape_retry(
    task: GuardedTask, request: Context, signature: Signature, given: bool, cause: BaseException | None
) -> None:
    """Make the signature of a retry that may be another action, or that comes after a published retry.

    Args:
        given: the retry has its own arguments.
        cause: the error that caused the retry.

    Raises:
        AlreadyComing: the same retry is already published.
        ConfigurationError: the intent already has a retry with other arguments.
        BaseException: the cause, if it leaves the effect unknown. The part of the body that would become another intent
            may have had its effect, so this body is in doubt.
    """
    claim: Hold = request.idem_claim
    first = retries_of(claim).signal
    if given and _make_apart(task, request, claim, signature):
        if cause is not None and task.guard.kind_of(cause) in DOUBTFUL:
            raise cause
        return
    if first is None:
        continue_intent(task, request, signature)
        return
    if given and first.sig is not None and not _alike(first.sig, signature):
        raise ConfigurationError(
            f"{claim.key}: a second retry with other arguments was asked for, but those arguments make the same "
            "intent, and an intent has one retry. The first one is published and will run; this one was not "
            "published. Let the intent name what tells the two actions apart.",
            claim.key,
        )
    raise AlreadyComing


def _make_apart(task: GuardedTask, request: Context, claim: Hold, signature: Signature) -> bool:
    """Make a retry a separate call if its arguments make another intent. Return False if they do not."""
    declaration, namespace = task.guard.declaration, task.guard.ledger.namespace
    labels = _labels(request)
    caller_key = labels.get(CALLER_KEY)

    def identity(args: Any, kwargs: Any) -> tuple[str, bytes]:
        arguments = declaration.bind(args, kwargs)
        key = keys.key_of(declaration, namespace, arguments, labels)
        return key, b"" if caller_key is None else declaration.fingerprint(arguments, caller_key).packed

    try:
        asked = identity(signature.args, signature.kwargs)
    except TypeError:
        return False  # Celery reports such a call
    mine = claim.key, b"" if caller_key is None else claim.fingerprint.packed
    if asked in (mine, identity(request.args, request.kwargs)):
        return False
    options = signature.options
    if caller_key is not None:  # it names the whole call, so this part gets another key
        labels[CALLER_KEY] = keys.downstream_key(claim.key, asked[1].hex())
    kept = {k: v for k, v in (options.get("headers") or {}).items() if not k.startswith("idem-")}
    options.update(task_id=uuid(), parent_id=request.id)
    options["headers"] = {**kept, **labels, MESSAGE: options["task_id"]}
    for name in _OF_ITS_CANVAS:
        options.pop(name, None)
    return True


def _labels(request: Context) -> dict[str, Any]:
    known = request.headers or {}
    return {name: known[name] for name in keys.IDENTITY if name in known}


def _alike(one: Signature, other: Signature) -> bool:
    return (tuple(one.args), dict(one.kwargs)) == (tuple(other.args), dict(other.kwargs))


def note_published(request: Context | None, options: dict[str, Any], call: bytes) -> None:
    """Note a published message that continues the intent of the body that runs here.

    Args:
        call: the packed call of that message, for the record.
    """
    claim: Hold | None = getattr(request, "idem_claim", None)
    if claim is None or request is None or request.is_eager:  # an eager retry has run already
        return
    if options.get("task_id") == request.id:
        retries = retries_of(claim)
        retries.call = call
        if retries.signal is None:
            retries.signal = Retry(when=options.get("eta") or options.get("countdown"))


def note_retry(claim: Hold, signal: Retry, cause: BaseException | None) -> None:
    """Note what ``Task.retry`` has published: a retry of this intent, or another intent."""
    retries = retries_of(claim)
    if signal.sig is None or signal.sig.options.get(SAME_INTENT):
        retries.signal = signal
        if cause is not None:
            retries.causes.append(cause)
    else:
        retries.apart.append(signal)
        if signal.is_eager:  # no worker will run it
            signal.sig.apply()
