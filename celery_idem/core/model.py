"""The values everything else passes around. Frozen data: no I/O, no clock.

Times are integers in microseconds of the *store's* clock; durations are integers
in microseconds. One unit everywhere, so that no line has to convert in its head.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Literal, NamedTuple

MICROSECONDS = 1_000_000
"""Microseconds in a second."""

NO_OWNER = bytes(12)
"""The owner of a record without a holder; a minted owner is never all zero."""

OnCrash = Literal["in_doubt", "resume", "rerun", "transaction"]
OnLate = Literal["in_doubt", "run"]

# Message headers. Everything that gives an intent its key travels, so that a worker can
# derive the key itself; the key travels too, so that it is derived once.
KEY = "idem-key"
SCOPE = "idem-scope"
OCCURRENCE = "idem-occurrence"
CALLER_KEY = "idempotency-key"
FINGERPRINT = "idem-fingerprint"
"""Only in a message that continues an intent (its retry, a waiting duplicate): what the intent's
arguments were, in hex. It is compared with itself, whatever the body made of its arguments."""

PART_OF = "idem-part-of"
"""The action, named by a caller's own key, whose body made this call (``docs/adr/0014``)."""

ACCEPTED_AT = "idem-accepted"
"""Which record the call was accepted in: its stamp and its owner, in hex. A claim that replaces that very write needs
one round trip; where the record has changed, it decides on what stands there."""

PUBLISHED = "idem-published"
"""When the call was first due (published, or its ETA): seconds since 1970, by its producer's clock."""

MESSAGE = "idem-message"
"""Id of the message that the headers above were made for; "" for one that is still to be made of them.
Headers that were copied into another message are not that message's own."""


class State(IntEnum):
    """Where an intent stands. The numbers are part of the stored format: never reuse one."""

    RUNNING = 1
    SCHEDULED = 2
    RELEASED = 3
    SUCCEEDED = 4
    FAILED = 5
    IN_DOUBT = 6
    CANCELLED = 7
    ACCEPTED = 8

    @property
    def settled(self) -> bool:
        """The outcome is known and will not change any more."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Outcome(NamedTuple):
    """How the action ended.

    Attributes:
        succeeded: False when the body raised.
        payload: the encoded value or error; None when it could not be stored.
        missing: why there is no payload, for people; empty when there is one.
        replaced_by: id of the task that has the result, where the body handed its action over to one.
        cancelled: a person cancelled it before it was done; ``missing`` says who, and what is done of it.
        trace: the span in which it was made: 16 bytes of trace id, 8 of span id, 1 of flags; empty where spans are not
            recorded.
    """

    succeeded: bool
    payload: bytes | None
    missing: str = ""
    replaced_by: str = ""
    trace: bytes = b""
    cancelled: bool = False

    @property
    def traced(self) -> dict[str, Any]:
        """The span as a detail of an event, in W3C's form (``traceparent``); nothing without one."""
        if not self.trace:
            return {}
        text = self.trace.hex()
        return {"trace": f"00-{text[:32]}-{text[32:48]}-{text[48:]}"}


TRACE_SIZE = 25
"""Bytes of the context of a span."""


class Step(NamedTuple):
    """A finished part of a body: its name, and its encoded result."""

    name: str
    payload: bytes


class Would(IntEnum):
    """What a guard would have done with a call in shadow mode, where every call runs.

    The numbers are part of the stored format: never reuse one.
    """

    REPLAY = 1
    BUSY = 2
    MISMATCH = 3
    IN_DOUBT = 4


class Late(NamedTuple):
    """A suspected second effect: an execution ended after another attempt, or a person, had taken its intent over.

    Attributes:
        task_id, fence: of the execution that ended late. The fence is the store's time of its claim; 0: it ran
            without one.
        place: where it ran.
        succeeded, payload: how it ended, as in an outcome; no payload where that is too large for a note.
        stood_task_id, stood_fence, stood_place: the attempt that the record was about then; no place where a person had
            decided.
        stood_at: the stamp of the record then: of its outcome, where it had one.
    """

    task_id: str
    fence: int
    place: str
    succeeded: bool
    payload: bytes
    stood_task_id: str
    stood_fence: int
    stood_place: str
    stood_at: int


class Resolution(IntEnum):
    """What a person, or the destination that a worker asked, decided about an intent.

    Stored where a shadow record's note has its ``Would``, so the numbers differ. Never reuse one.
    """

    HAPPENED = 101
    NOT_HAPPENED = 102
    FORGOTTEN = 103
    CANCELLED = 104


class Note(NamedTuple):
    """One line of a record's audit trail: who decided what, when, and on what evidence.

    Attributes:
        what: for people, as ``evidence`` is.
        would: of a shadow record: what a guard would have done with the call; None in any other note.
        differs: with ``Would.MISMATCH``: the parameters that had another value.
        late: the note is about a suspected second effect; None in any other.
        resolution: the note is about a decision; None in any other.
    """

    at: int
    by: str
    what: str
    evidence: str
    would: Would | None = None
    differs: tuple[str, ...] = ()
    late: Late | None = None
    resolution: Resolution | None = None


FINGERPRINT_TAG = 4
"""Bytes of a parameter's tag: names only have to differ within one task's parameters."""

FINGERPRINT_ENTRY = 12
"""Bytes of a parameter's tag and its value's digest: 64 bits of it, so that no two values agree by chance."""


SCOPE_SIZE = 16
"""Bytes of a scope's digest: as much of it as of a key's, because it too decides who may look."""


class Fingerprint(NamedTuple):
    """What must be equal whenever the same intent comes back.

    Attributes:
        names: parameter names, sorted.
        packed: for each name, in that order, an entry: a tag of the name, and a digest
            of its value (see ``keys.Declaration.fingerprint``).
    """

    names: tuple[str, ...] = ()
    packed: bytes = b""


NO_FINGERPRINT = Fingerprint()
"""Of a task whose intent says everything: nothing else must match."""


class Noticed(NamedTuple):
    """The store's clock had gone back when a record was met: its stamp says nothing of how old it is.

    Attributes:
        at: the store's time then: the hold counts from there.
        stamp: of the write that noted this. Any later one is a sign of life, and makes it void.
    """

    at: int
    stamp: int


class Recovery(NamedTuple):
    """What recovery has done for an open record since it was last claimed.

    Attributes:
        tries: how often the record's call was published.
        wait: microseconds after the store's stamp until it is looked at again.
    """

    tries: int
    wait: int


class Record(NamedTuple):
    """All that is known of one intent. A named tuple: it is made four times per task,
    and a frozen dataclass takes five times as long to make.

    Attributes:
        owner: 12 bytes minted per execution; the execution that knows them may settle.
        task_id: the Celery task id of the latest execution.
        fence: grows with every new owner; 0 only in a value not yet stamped.
        attempts: executions so far, the current one included.
        crashes: how many of them ended without a word.
        lease: RUNNING, SCHEDULED, and IN_DOUBT while a worker asks: microseconds
            after the store's stamp at which the hold lapses.
        asking: the token of the worker that is asking the destination.
        open_steps: steps that began and have not ended, in that order: the one that runs, and any
            whose error its body swallowed, so that it is unknown whether they took effect.
        reason: why it is in doubt.
        digests: per-field digests for finding key drift; may be empty.
        noticed: the store's clock had gone back, see there.
        scope: digest of the scope that the intent belongs to; empty for none.
        call: what it takes to publish the same message again (see ``calls``); only while the intent is open, or where
            it was contested or decided.
        place: host and process of the latest execution; only while the intent is open, or where it was contested.
        recovery: what recovery has done; None: nothing.
    """

    state: State
    owner: bytes = NO_OWNER
    task_id: str = ""
    fence: int = 0
    attempts: int = 1
    crashes: int = 0
    lease: int = 0
    fingerprint: bytes = b""
    steps: tuple[Step, ...] = ()
    open_steps: tuple[str, ...] = ()
    asking: bytes = b""
    reason: str = ""
    notes: tuple[Note, ...] = ()
    digests: bytes = b""
    noticed: Noticed | None = None
    scope: bytes = b""
    call: bytes = b""
    place: str = ""
    recovery: Recovery | None = None
    outcome: Outcome | None = None


class Stored(NamedTuple):
    """A value as a store holds it: the bytes, and the store's time of the last write."""

    value: bytes
    stamp: int


class Policy(NamedTuple):
    """The author's choices the protocol needs. Durations in microseconds."""

    lease: int
    result_ttl: int
    failure_ttl: int
    on_crash: OnCrash = "in_doubt"
    asks: bool = False
    max_attempts: int = 3
    max_step_bytes: int = 1 << 20
    indexed: bool = True  # False for shadow records: nobody looks at those when a lease lapses
    late: OnLate = "in_doubt"


class Request(NamedTuple):
    """One execution that wants to claim an intent.

    Attributes:
        owner: minted for this attempt to claim, and for no other.
        carried: owners of earlier attempts of the same message whose reply got
            lost before the body ran.
        scope: digest of the scope that the call was made in; empty for none.
        call: what it takes to publish the same message again; empty where that is not kept.
        place: host and process of this execution.
        accepted: the write in which the call was accepted, with its owner in the place of the value; None where it
            was not, or where that is not known.
        age: microseconds since the call was due, of a message that may have been here before; 0: it was not, or that
            is not known.
    """

    owner: bytes
    task_id: str
    fingerprint: Fingerprint
    policy: Policy
    carried: tuple[bytes, ...] = ()
    digests: bytes = b""
    scope: bytes = b""
    call: bytes = b""
    place: str = ""
    accepted: Stored | None = None
    age: int = 0


# --- decisions: a closed set ---------------------------------------------------------


class Acquired(NamedTuple):
    """Run the body: this execution owns the intent.

    Attributes:
        orphan: the call of a dead execution under another task id, whose caller may wait for an answer that nobody
            would give: publish it, and it is an ordinary duplicate.
    """

    record: Record
    orphan: bytes = b""


class Accepted(NamedTuple):
    """The call is accepted: it will happen. Publish it; where that fails, recovery does."""

    record: Record


class Replay(NamedTuple):
    """Do nothing: here is the outcome. ``own``: it is that of the same task id, whose message was redelivered."""

    outcome: Outcome
    own: bool = True


class Busy(NamedTuple):
    """Somebody holds it; it may change after ``retry_after`` microseconds.

    Attributes:
        holder: the owner that runs it, or asks; empty when it waits for its own retry.
        own: the message is the intent's own (the same task id): a redelivery, or a retry that came
            before SCHEDULED was written. It waits, whatever duplicates receive.
    """

    retry_after: int
    holder: bytes = b""
    own: bool = False


class Ask(NamedTuple):
    """Ask the destination, then conclude: this execution holds the right to ask. ``orphan``: see ``Acquired``.

    Attributes:
        first: it was not in doubt before.
    """

    record: Record
    orphan: bytes = b""
    first: bool = False


class InDoubt(NamedTuple):
    """Nobody here can know whether the effect happened. ``orphan``: see ``Acquired``; ``first``: see ``Ask``."""

    reason: str
    orphan: bytes = b""
    first: bool = False


class Mismatch(NamedTuple):
    """Same intent, other values; ``differs`` names the parameters."""

    differs: tuple[str, ...]


Decision = Acquired | Replay | Busy | Ask | InDoubt | Mismatch


class Done(NamedTuple):
    """The owner's write is in, or was in already."""

    record: Record


class Refused(NamedTuple):
    """Not the current owner: nothing was written. ``record`` is what stands there."""

    record: Record | None


class StepDone(NamedTuple):
    """This step ran already: here is its encoded result."""

    payload: bytes


class StepOpen(NamedTuple):
    """The step began in an earlier attempt and never ended."""

    record: Record


class StepsFull(NamedTuple):
    """The record has no place for one more step: it may not begin.

    Attributes:
        steps: finished ones.
        size: bytes of their results.
    """

    steps: int
    size: int


StepDecision = Done | Refused | StepDone | StepOpen | StepsFull


class Publish(NamedTuple):
    """Publish the record's call again. ``record`` must be written first: it says that this process took it."""

    record: Record


class Tell(NamedTuple):
    """Nobody works on the record any more: its caller is to know that it is in doubt. ``record`` must be written first.

    Attributes:
        first: nobody else has told them: recovery itself has given it up.
    """

    record: Record
    first: bool = False


class Again(NamedTuple):
    """Deliver the message once more: that delivery finds in the record what to do."""


class Coming(NamedTuple):
    """The message's own retry is under way already, and will give the answer."""


Verdict = InDoubt | Again | Coming
"""What becomes of a message whose process died."""


# --- answers of a destination, or of a person ----------------------------------------


@dataclass(frozen=True)
class Happened:
    """The effect did happen; ``result`` is what every caller will get."""

    result: Any = None


@dataclass(frozen=True)
class NotHappened:
    """The effect did not happen, and no request for it is still under way."""


@dataclass(frozen=True)
class Unknown:
    """The destination cannot tell; ``reason`` is for the person who must."""

    reason: str = ""


Answer = Happened | NotHappened | Unknown


class Raised(Enum):
    """What kind of exception left the body."""

    RETRY = "retry"  # and the message is published
    DOUBTFUL_RETRY = "doubtful_retry"  # the same, because of an error after which the effect is unknown
    REPLACED = "replaced"
    IGNORE = "ignore"
    SAID_DONE = "said_done"  # Ignore, after the body has written the state SUCCESS itself
    SAID_FAILED = "said_failed"  # the same with FAILURE
    REJECT = "reject"
    NO_EFFECT = "no_effect"
    AMBIGUOUS = "ambiguous"
    TIME_LIMIT = "time_limit"
    EXIT = "exit"
    ERROR = "error"
