"""The values that all other modules use. Frozen data: no I/O, no clock.

Times are integers: microseconds of the *store's* clock. Durations are microseconds too, so that one unit is used
everywhere.

Without ``from __future__ import annotations``: with it, annotations are text, and ``NamedTuple`` compiles the text of
every field when the module is imported.
"""

from enum import Enum, IntEnum
from typing import Any, Literal, NamedTuple, NoReturn

MICROSECONDS = 1_000_000
"""Microseconds in a second."""

NO_OWNER = bytes(12)
"""The owner of a record without a holder; a minted owner is never all zero."""

OnCrash = Literal["in_doubt", "resume", "rerun", "transaction"]
OnLate = Literal["in_doubt", "run"]

# Message headers. They carry everything that an intent's key is derived from, so that a worker can derive it. They also
# carry the key itself, so that it is derived once.
KEY = "idem-key"
SCOPE = "idem-scope"
OCCURRENCE = "idem-occurrence"
CALLER_KEY = "idempotency-key"
FINGERPRINT = "idem-fingerprint"
"""Fingerprint of the intent's arguments, in hex. Only in a message that continues an intent (its retry, a waiting
duplicate), so that it does not matter whether the body has changed its arguments."""

PART_OF = "idem-part-of"
"""The action, named by a caller's own key, whose body made this call (``docs/adr/0014``)."""

ACCEPTED_AT = "idem-accepted"
"""The write that accepted the call: its stamp and its owner, in hex. A claim that replaces this write needs one round
trip. If the record has changed since, the claim decides on the record that is there."""

PUBLISHED = "idem-published"
"""When the call was first due (published, or its ETA), in seconds since 1970, by its producer's clock."""

MESSAGE = "idem-message"
"""Id of the message that the headers above were made for; "" if that message does not exist yet. With another id, they
were copied from another message, and do not count for this one."""


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
        succeeded: False if the body raised.
        payload: the encoded value or error; None if it could not be stored.
        missing: why there is no payload, for people; empty if there is one.
        replaced_by: id of the task that has the result, if the body replaced its task by another one.
        cancelled: a person cancelled it before it was done; ``missing`` says who, and which steps are done.
        trace: the span of the execution: 16 bytes of trace id, 8 of span id, 1 of flags; empty if spans are not
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
        """The span as a detail of an event, in W3C's form (``traceparent``); empty without a span."""
        if not self.trace:
            return {}
        text = self.trace.hex()
        return {"trace": f"00-{text[:32]}-{text[32:48]}-{text[48:]}"}


TRACE_SIZE = 25
"""Bytes of ``Outcome.trace``."""


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
        task_id, fence: the execution that ended late. The fence is the store's time of its claim; 0: it had no claim.
        place: where it ran.
        succeeded, payload: how it ended, as in an outcome; no payload if that is too large for a note.
        stood_task_id, stood_fence, stood_place: the attempt in the record at that time; no place if a person had
            decided.
        stood_at: the stamp of the record at that time, which is when its outcome was written, if it had one.
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
    """What was decided about an intent, by a person or by the answer of its destination.

    Stored where a shadow record's note has its ``Would``, so the numbers differ. Never reuse one.
    """

    HAPPENED = 101
    NOT_HAPPENED = 102
    FORGOTTEN = 103
    CANCELLED = 104


class Note(NamedTuple):
    """One line of a record's audit trail: who decided what, when, and on what evidence.

    Attributes:
        what, evidence: for people.
        would: in a shadow record: what the guard would have done with the call.
        differs: with ``Would.MISMATCH``: the parameters that had another value.
        late: in a note of a suspected second effect.
        resolution: in a note of a decision.
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
"""Bytes of a parameter's tag. Tags only have to differ among the parameters of one task."""

FINGERPRINT_ENTRY = 12
"""Bytes of a parameter's tag and of its value's digest. The digest has 64 bits, so that no two values agree by
chance."""


SCOPE_SIZE = 16
"""Bytes of a scope's digest: as many as a key has, because it too decides who may see a record."""


class Fingerprint(NamedTuple):
    """What must be equal whenever the same intent comes back.

    Attributes:
        names: parameter names, sorted.
        packed: an entry for each name, in that order: a tag of the name, and a digest of its value (see
            ``keys.Declaration.fingerprint``).
    """

    names: tuple[str, ...] = ()
    packed: bytes = b""


NO_FINGERPRINT = Fingerprint()
"""The fingerprint of a task without ``must_match``."""


class Noticed(NamedTuple):
    """A mark: the store's clock went back, so that a record's stamp does not say how old it is.

    Attributes:
        at: the store's time when a worker noticed this. The hold counts from there.
        stamp: stamp of the write that made the mark. A later write is a sign of life, and makes the mark void.
    """

    at: int
    stamp: int


class Recovery(NamedTuple):
    """What recovery has done for an open record since it was last claimed, or for a settled one whose answer is owed.

    Attributes:
        tries: how many times it published the record's call.
        wait: microseconds after the record's stamp until it looks again.
    """

    tries: int
    wait: int


class Record(NamedTuple):
    """All that is known of one intent.

    A named tuple, because a task makes four of them, and a frozen dataclass takes five times as long to make.

    Attributes:
        owner: 12 bytes minted per execution; the execution that knows them may settle.
        task_id: the Celery task id of the latest execution.
        fence: grows with every new owner; 0 only in a value that has no stamp yet.
        attempts: executions so far, with the current one.
        crashes: how many of them ended without an outcome.
        lease: microseconds after the record's stamp at which the hold lapses; in RUNNING, in SCHEDULED, and in IN_DOUBT
            while a worker asks. In ACCEPTED: until recovery looks.
        asking: the owner token of the worker that is asking the destination.
        open_steps: steps that began and have not ended, in that order: the one that runs, and those whose error the
            body swallowed, so that their effect is unknown.
        reason: why it is in doubt.
        digests: a digest per field, to find key drift; may be empty.
        noticed: mark that the store's clock went back.
        scope: digest of the scope that the intent belongs to; empty for none.
        call: what it takes to publish the same message again (see ``calls``); only while the intent is open, or if it
            was contested or decided.
        place: host and process of the latest execution; only while the intent is open, or if it was contested.
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
    """The author's choices that the protocol needs. Durations are in microseconds."""

    lease: int
    result_ttl: int
    failure_ttl: int
    on_crash: OnCrash = "in_doubt"
    asks: bool = False
    max_attempts: int = 3
    max_step_bytes: int = 1 << 20
    indexed: bool = True  # False for shadow records, which recovery leaves alone
    late: OnLate = "in_doubt"


class Request(NamedTuple):
    """One execution that wants to claim an intent.

    Attributes:
        owner: minted for this attempt to claim, and for no other.
        carried: owners of earlier claims of the same message whose reply was lost before the body ran.
        scope: digest of the scope that the call was made in; empty for none.
        call: what it takes to publish the same message again; empty if that is not kept.
        place: host and process of this execution.
        accepted: the write that accepted the call, with its owner instead of a value; None if there is none, or it is
            not known.
        age: microseconds since the call was due, of a message that may have been delivered before; 0: it was not, or
            that is not known.
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


class _WithRecord(NamedTuple):
    """The fields of a decision that has only the record to write, or the one that is written."""

    record: Record


class Acquired(NamedTuple):
    """Run the body: this execution owns the intent.

    Attributes:
        orphan: the call of a dead execution under another task id. Its caller may still wait for an answer. Publish it:
            its delivery is an ordinary duplicate, and gets the answer.
    """

    record: Record
    orphan: bytes = b""


class Accepted(_WithRecord):
    """The call is accepted: it will happen. Publish it; if that fails, recovery does."""

    __slots__ = ()


class Replay(NamedTuple):
    """Return this outcome and run nothing.

    Attributes:
        own: it is the outcome of the same task id (a redelivery).
        owed: this answer is owed to the caller, and the record says so until it is given.
    """

    outcome: Outcome
    own: bool = True
    owed: bool = False


class Busy(NamedTuple):
    """Another execution holds the intent; this may change after ``retry_after`` microseconds.

    Attributes:
        holder: the owner that runs it, or asks; empty while it waits for its own retry.
        own: the message has the record's task id: it is a redelivery, or a retry that came before SCHEDULED was
            written. It waits, even if duplicates receive an error.
    """

    retry_after: int
    holder: bytes = b""
    own: bool = False


class Ask(NamedTuple):
    """Ask the destination, then conclude: this execution holds the right to ask.

    Attributes:
        orphan: see ``Acquired``.
        first: the intent was not in doubt before.
    """

    record: Record
    orphan: bytes = b""
    first: bool = False


class InDoubt(NamedTuple):
    """It is unknown whether the effect happened. ``orphan``: see ``Acquired``; ``first``: see ``Ask``."""

    reason: str
    orphan: bytes = b""
    first: bool = False


class Mismatch(NamedTuple):
    """The same intent with other values; ``differs`` names the parameters."""

    differs: tuple[str, ...]


Decision = Acquired | Replay | Busy | Ask | InDoubt | Mismatch


class Done(_WithRecord):
    """The owner's write is stored, now or earlier."""

    __slots__ = ()


class Refused(NamedTuple):
    """Not the current owner: nothing was written. ``record`` is the stored one."""

    record: Record | None


class StepDone(NamedTuple):
    """This step has run; ``payload`` is its encoded result."""

    payload: bytes


class StepOpen(_WithRecord):
    """The step began in an earlier attempt and never ended."""

    __slots__ = ()


class StepsFull(NamedTuple):
    """The record is full, so that no other step may begin.

    Attributes:
        steps: number of finished steps.
        size: bytes of their results.
    """

    steps: int
    size: int


StepDecision = Done | Refused | StepDone | StepOpen | StepsFull


class Publish(_WithRecord):
    """Publish the record's call again, once ``record`` is written: it says that this process took the call."""

    __slots__ = ()


class Tell(NamedTuple):
    """Tell the caller the outcome, or that the intent is in doubt, once ``record`` is written.

    Attributes:
        first: recovery itself has given the intent up, so no process has told the caller before.
    """

    record: Record
    first: bool = False


class Again:
    """Deliver the message once more: that delivery decides by the record."""


class Coming:
    """The message's own retry is under way, and will give the answer."""


Verdict = InDoubt | Again | Coming
"""What becomes of a message whose process died."""


# --- answers of a destination, or of a person ----------------------------------------


class _Answer:
    """A value: it cannot be changed, and equals another one of its class with the same content.

    A frozen dataclass would do the same, but the methods that ``dataclass`` generates for three classes take a
    hundredth of the time in which Celery is imported.
    """

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__qualname__}({given})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} cannot be changed: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} cannot be changed: {name}")


class Happened(_Answer):
    """The effect happened; every caller will get ``result``."""

    result: Any
    __match_args__ = ("result",)

    def __init__(self, result: Any = None) -> None:
        vars(self)["result"] = result


class NotHappened(_Answer):
    """The effect did not happen, and no request for it is still under way."""


class Unknown(_Answer):
    """The destination cannot tell; ``reason`` is for the person who has to decide."""

    reason: str
    __match_args__ = ("reason",)

    def __init__(self, reason: str = "") -> None:
        vars(self)["reason"] = reason


Answer = Happened | NotHappened | Unknown


class Raised(Enum):
    """What kind of exception left the body."""

    RETRY = "retry"  # and the message is published
    DOUBTFUL_RETRY = "doubtful_retry"  # the same, after an error that leaves the effect unknown
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
