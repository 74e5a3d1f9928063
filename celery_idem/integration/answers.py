"""Writes the result for Celery's result backend together with the record's outcome.

Celery reads the old result of a task, and then writes and publishes the new one. These are two round trips after the
outcome is settled. If the store is the result backend's own database, the write of the outcome contains those bytes.
Celery's read protects an earlier success; here the fence has decided already that this outcome counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from celery._state import get_current_task
from celery.app.task import Task
from celery.states import PENDING, PROPAGATE_STATES, STARTED, SUCCESS

from celery_idem.core.model import Outcome
from celery_idem.stores.base import Announcement

if TYPE_CHECKING:
    from celery.app.task import Context

ANSWERED = "idem_answered"
"""Attribute of a request whose result is already written."""

FIRST = "idem_first"
"""Attribute of a request whose task id has no earlier result that Celery would have to keep."""

DONE = "idem_done"
"""Attribute of a request whose body has written SUCCESS itself. Celery keeps that result, whatever is written later."""

STARTING = "idem_starting"
"""Attribute of a request: the meta of STARTED, which Celery wanted to write before the claim."""

TWIN = "_idem_twin"
"""Attribute of a backend: what ``aware`` returns for it."""


class Kind(NamedTuple):
    """What a result backend does with answers.

    Attributes:
        stores: it keeps results, or sends them.
        tells: another process can read there whether a task has its result.
        repeats: a task that finishes a second time does no harm to its chord: the backend looks which parts are there,
            and does not count them.
    """

    stores: bool
    tells: bool
    repeats: bool

    def has_answer(self, backend: Any, request: Context, outcome: Outcome) -> bool:
        """Whether a caller is known to have the answer of this outcome, and all that comes after it.

        Celery writes a success after links and the next message of a chain, and before the part of a chord. It writes a
        failure before errbacks and the rest of a chain.
        """
        if not self.tells or request.ignore_result or request.chord:
            return False
        more = request.errbacks or request.chain
        return is_answered(backend, request.id, outcome) and (outcome.succeeded or not more)


def is_answered(backend: Any, task_id: str, outcome: Outcome) -> bool:
    """Whether the result of a task is that of this outcome, as far as its state tells."""
    state = backend.get_state(task_id)
    return bool(state == SUCCESS if outcome.succeeded else state in PROPAGATE_STATES)


def kind_of(task: Any) -> Kind:
    """Return what a task's result backend does. Its class says so, and is known without importing other backends."""
    # Imported late: Celery loads it with its first backend.
    from celery.backends.base import DisabledBackend

    # Without a driver, or with wrong settings, Celery reports that to the program that needs the backend.
    try:
        backend = task.backend
    except Exception:
        return Kind(False, False, False)
    modules = {cls.__module__ for cls in type(backend).__mro__}
    stores = not isinstance(backend, DisabledBackend)
    part = getattr(type(backend), "on_chord_part_return", None)
    home = getattr(part, "__module__", "")
    polls = home == "celery.backends.base" and not getattr(backend, "implements_incr", False)
    sorts = home == "celery.backends.redis" and bool(getattr(backend, "_chord_zset", False))
    return Kind(stores, stores and "celery.backends.rpc" not in modules, polls or sorts)


_WRITING = (
    "set", "_set", "_set_with_state", "store_result", "_store_result", "mark_as_done", "encode", "encode_result",
)  # fmt: skip
"""Methods of a backend that write a result. Where a program has replaced one of them, it has to be called."""


def answering(task: Task) -> Any:
    """Return the application's result backend as ``aware`` makes it, if the task uses it.

    None for other backends than Celery's own for Redis, for subclasses of those, and for patched ones. Use the
    result only to encode bytes, because each thread has its own backend.
    """
    backend = aware(task.app.backend)
    known = task.backend is backend and type(backend) in _classes.values() and not _is_patched(backend)
    return backend if known else None


def _is_patched(backend: Any) -> bool:
    """Whether a program has put its own function in the place of a method that writes, in the object or the class."""
    if not vars(backend).keys().isdisjoint(_WRITING):
        return True
    methods = (getattr(type(backend), name, None) for name in _WRITING)
    return any(one and one.__module__.partition(".")[0] not in ("celery", "celery_idem") for one in methods)


def announcement(backend: Any, request: Context, value: Any, state: str = SUCCESS) -> Announcement | None:
    """Return what the result backend would write for a task that succeeded or began; None if Celery has to write it.

    The bytes come from the backend's own methods. A task with links or a chain is left to Celery: it publishes those
    messages before it stores the result, because the result lists them as children.
    """
    if (request.callbacks or request.chain) and state == SUCCESS:
        return None
    if vars(request).get("ignore_result"):
        return None
    try:
        meta = backend._get_result_meta(
            result=backend.encode_result(value, state), state=state, traceback=None, request=request
        )
        meta["task_id"] = request.id
        encoded = backend.encode(meta)
        key = backend.get_key_for_task(request.id)
        payload = encoded.encode() if isinstance(encoded, str) else encoded
    except Exception:  # Celery will run into the same error, and report it where its users look
        return None
    if len(payload) > backend._MAX_STR_VALUE_SIZE:
        return None
    return Announcement(key.encode() if isinstance(key, str) else key, payload, backend.expires or None)


def aware(backend: Any) -> Any:
    """Return a twin of a backend which leaves out what the settlement makes unnecessary.

    It does not write a result again that the settlement has written. It does not look for an earlier success under the
    task id of a duplicate, which has not run. The twin shares all state with the backend, and is an instance of its
    class. Backends other than Celery's own for Redis are returned unchanged.
    """
    twin = vars(backend).get(TWIN)
    if twin is None:
        cls = type(backend)
        if cls.__module__ == "celery.backends.redis" and cls.__name__ in ("RedisBackend", "SentinelBackend"):
            twin = _seen_as(_aware_class(cls), backend)
        else:
            twin = backend
        vars(backend)[TWIN] = twin
    return twin


def _left_to_the_claim(backend: Any, request: Any, state: str) -> bool:
    """Whether a state need not be written now, because it is STARTED and the coming claim can write it."""
    known = vars(request)
    if state != STARTED or "idem_claim" in known or request.is_eager:
        if STARTING in known and "idem_claim" not in known:
            del known[STARTING]  # the later state counts
        return False
    try:
        task = backend.app.tasks[request.task]
        if type(task).before_start is not Task.before_start:
            return False  # it is called before the claim, and may read the state
        guard = task.guard
        return guard.answers is not None and not guard.settings.shadow
    except Exception:  # the delivery will run into the same error, and report it
        return False


def _note_done(task_id: str) -> None:
    """Note that a body writes the SUCCESS of its own task id through ``self.backend``."""
    task = get_current_task()
    if task is not None and task.request.id == task_id:
        setattr(task.request, DONE, True)


def _seen_as(cls: type[Any], backend: Any) -> Any:
    """Return an instance of another class that shares the backend's state."""
    other = object.__new__(cls)
    other.__dict__ = vars(backend)
    return other


_classes: dict[type[Any], type[Any]] = {}


def _aware_class(cls: Any) -> type[Any]:
    if cls not in _classes:
        nothing = {"status": PENDING, "result": None}
        unread = type(cls.__name__, (cls,), {"_get_task_meta_for": lambda self, task_id: nothing})

        def mark_as_done(
            self: Any,
            task_id: str,
            result: Any,
            request: Any = None,
            store_result: bool = True,
            state: str = SUCCESS,
        ) -> None:
            if request is not None and vars(request).pop(ANSWERED, False):
                store_result = False  # what remains to do is this task's part of a chord
            cls.mark_as_done(self, task_id, result, request, store_result, state)

        def store_result(
            self: Any,
            task_id: str,
            result: Any,
            state: str,
            traceback: Any = None,
            request: Any = None,
            **kwargs: Any,
        ) -> Any:
            if request is None and state == SUCCESS:
                _note_done(task_id)
            if getattr(request, "id", None) == task_id and _left_to_the_claim(self, request, state):
                vars(request)[STARTING] = result
                return result
            return cls.store_result(self, task_id, result, state, traceback, request, **kwargs)

        def _store_result(self: Any, *args: Any, request: Any = None, **kwargs: Any) -> Any:
            first = request is not None and vars(request).pop(FIRST, False)
            return cls._store_result(
                _seen_as(unread, self) if first else self, *args, request=request, **kwargs
            )

        def reduced(self: Any) -> Any:  # an AsyncResult is pickled with its backend
            return _seen_as(cls, self).__reduce__()

        methods = {
            "mark_as_done": mark_as_done,
            "store_result": store_result,
            "_store_result": _store_result,
            "__reduce__": reduced,
        }
        # Two threads may get here at once. Both must use one class, because ``answering`` looks for it here.
        _classes.setdefault(cls, type(cls.__name__, (cls,), {"__module__": __name__, **methods}))
    return _classes[cls]
