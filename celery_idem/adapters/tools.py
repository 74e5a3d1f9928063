"""Makes a tool of a task: a schema for its arguments, descriptions for a model, and a call that returns values.

The HTTP, MCP and agent adapters share this module. It needs pydantic, which each of their extras installs.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery_idem.core.errors import ConfigurationError, IntentError, needs
from celery_idem.core.keys import Declaration, task_of
from celery_idem.core.pydantic_models import is_model
from celery_idem.engine import events
from celery_idem.integration.awaiting import in_thread
from celery_idem.integration.declaring import called_of
from celery_idem.integration.looking import look_up
from celery_idem.integration.receipts import Code, Receipt, Status
from celery_idem.integration.submitting import submit_task
from celery_idem.integration.task import IdempotentTask

if TYPE_CHECKING:
    from celery import Celery
    from pydantic import BaseModel

OCCURRENCE_MAX = 255
"""Maximum length of an occurrence or a key from outside: as for Stripe's keys, and enough for any id."""

ROLES = {
    "intent": "Says which action this is. Repeat it unchanged when you repeat the call.",
    "must_match": "Must be the same whenever the same action is repeated.",
    "free": "Free: other words here do not make it another action.",
}
"""The description of each parameter for a model."""

OCCURRENCE_WORDS = (
    "Leave it out, also when you repeat a call. Only for one more action that is meant to be like an earlier "
    "one: a name for it, such as second-reminder."
)

ADVICE = (
    "Safe to call again: the same action takes effect once, and the answer says whether it was done now or "
    "earlier. Do what `next` in the answer says."
)


_FIELDS: dict[str, Any] = {
    "status": {"enum": list(typing.get_args(Status))},
    "key": {"type": "string"},
    "task_id": {"type": "string"},
    "result": {},
    "reason": {"type": "string"},
    "code": {"enum": list(typing.get_args(Code))},
    "differs": {"type": "array", "items": {"type": "string"}},
    "retry_after": {"type": ["number", "null"]},
    "next": {"type": "string"},
}
RECEIPT: dict[str, Any] = {"type": "object", "properties": _FIELDS, "required": list(_FIELDS)}
"""JSON schema of ``Receipt.to_dict()``."""


class BadArguments(Exception):
    """The arguments do not fit the task. Nothing was done.

    Args:
        problems: one line each, with the parameter's name and never its value.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True)
class Tool:
    """One task as a tool. Make it with ``tool_of``."""

    task: IdempotentTask
    declaration: Declaration
    model: type[BaseModel]
    occurrences: bool

    @property
    def name(self) -> str:
        return str(self.task.name)

    @property
    def description(self) -> str:
        """The task's docstring, and what a model must know about repeating a call."""
        return "\n\n".join(filter(None, [inspect.getdoc(self.task.run), ADVICE]))

    @property
    def idempotent(self) -> bool:
        """False if the settings let a repetition run: in shadow mode, without ``result_ttl``, or when failing open."""
        settings = self.task.guard.settings
        return not settings.shadow and settings.result_ttl > 0 and settings.on_store_error != "run"

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of the arguments, an object. ``x-idem`` is each parameter's role."""
        schema = self.model.model_json_schema(mode="validation")
        schema.pop("title", None)
        schema.setdefault("properties", {})
        for name, entry in schema["properties"].items():
            entry.pop("title", None)
            if self.occurrences and name == "occurrence":
                entry["description"] = OCCURRENCE_WORDS
                continue
            role = self.role(name)
            if role:
                entry["description"] = " ".join(filter(None, [entry.get("description"), ROLES[role]]))
                entry["x-idem"] = role
        return schema

    def role(self, parameter: str) -> str:
        """Return ``intent``, ``must_match`` or ``free``; "" if a function computes the intent."""
        if parameter in self.declaration.must_match:
            return "must_match"
        if self.declaration.compute is not None:
            return ""
        fields = self.declaration.fields
        return "intent" if fields is None or parameter in fields else "free"

    def parse(self, arguments: str | bytes) -> dict[str, Any]:
        """Return the arguments in a JSON text, with the task's own types.

        Raises:
            BadArguments: it is no JSON, or it does not fit. Text is never converted to a number.
        """
        from pydantic import ValidationError

        try:
            parsed = self.model.model_validate_json(arguments, strict=True)
        except ValidationError as error:
            raise BadArguments(
                f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}"
                for problem in error.errors(include_input=False, include_context=False, include_url=False)
            ) from None
        known = parsed.model_dump(by_alias=True, exclude_unset=True)
        sent = json.loads(arguments)
        for name, field in type(parsed).model_fields.items():
            alias = field.alias or name
            if alias in sent and _has_model(getattr(parsed, name)):
                # Keep it as it was sent, because dumping a model hides secrets and drops excluded fields.
                known[alias] = sent[alias]
        return known

    def submit(
        self,
        arguments: Mapping[str, Any],
        scope: str | None = None,
        occurrence: str | None = None,
        idempotency_key: str | None = None,
    ) -> Receipt:
        """As ``IdempotentTask.submit``, with a receipt also if the call cannot be published.

        Args:
            occurrence: given by the host; used if the arguments have none.

        Raises:
            BadArguments: an argument is missing, or cannot be part of a key.
        """
        args, kwargs = self._split(arguments)
        if self.occurrences:
            occurrence = kwargs.pop("occurrence", None) or occurrence
        try:
            return submit_task(self.task, args, kwargs, scope, occurrence, idempotency_key, {})
        except (TypeError, IntentError) as error:
            raise BadArguments([str(error)]) from None
        except Exception as error:  # of any driver; the caller must get an answer
            events.diagnose(logging.ERROR, "%s could not be published", self.name, error=error)
            return Receipt("not_run", "", reason=type(error).__name__, code="not_sent")

    def _split(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and named arguments. Only positional-only parameters are given by position."""
        kwargs = dict(arguments)
        args = []
        for name, parameter in self.declaration.signature.parameters.items():
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and name in kwargs:
                args.append(kwargs.pop(name))
        return args, kwargs


def _has_model(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return is_model(value) or (
        isinstance(value, (list, tuple, set, frozenset)) and any(map(_has_model, value))
    )


def tool_of(app: Celery, name: str, occurrences: bool = False) -> Tool:
    """Return the task of this name as a tool.

    Args:
        occurrences: offer ``occurrence`` as an argument, for actions with intended repetitions ("second reminder").

    Raises:
        ConfigurationError: there is no such task, it declares no intent, or it cannot be called with named arguments.
    """
    task = app.tasks.get(name)
    if task is None:
        raise ConfigurationError(f"There is no task {name!r}. Import its module before you offer it.")
    declaration = getattr(task, "idem_declaration", None)
    if declaration is None:
        raise ConfigurationError(
            f"{name} declares no intent, so a caller that repeats it would do it twice. Add intent=(…) to the task."
        )
    if occurrences and "occurrence" in declaration.signature.parameters:
        raise ConfigurationError(f"{name} has a parameter called 'occurrence' of its own. Rename it.")
    tool = Tool(task, declaration, _model_of(task, declaration, occurrences), occurrences)
    try:
        tool.schema()
    except Exception as error:
        raise ConfigurationError(f"The parameters of {name} have no JSON schema: {error}") from error
    return tool


def _model_of(task: IdempotentTask, declaration: Declaration, occurrences: bool) -> type[BaseModel]:
    with needs("Offering a task as a tool needs pydantic", "agents"):
        from pydantic import ConfigDict, Field, create_model

    hints = annotations_of(task)
    fields: dict[str, Any] = {}
    open_ended = False
    for number, (name, parameter) in enumerate(declaration.signature.parameters.items()):
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            open_ended = True
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise ConfigurationError(
                f"{task.name} takes *{name}, which has no place among named arguments. Give it a list parameter."
            )
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        # With an alias, because pydantic reserves some names, and a task may use any.
        fields[f"p{number}"] = (hints.get(name, Any), Field(default, alias=name))
    if occurrences:
        limited = Field(None, alias="occurrence", min_length=1, max_length=OCCURRENCE_MAX)
        fields["occurrence"] = (typing.Optional[str], limited)  # noqa: UP045  # a value, not an annotation
    config = ConfigDict(extra="allow" if open_ended else "forbid", arbitrary_types_allowed=True)
    title = task.name.replace(".", "_")
    return create_model(title, __config__=config, **fields)


def annotations_of(task: IdempotentTask) -> dict[str, Any]:
    """Return the body's annotations, evaluated.

    Raises:
        ConfigurationError: an annotation cannot be evaluated.
    """
    known = called_of(type(task))
    hints: dict[str, Any] = {}
    try:
        for function in {id(each): each for each in known.owners.values()}.values():
            theirs = typing.get_type_hints(function, include_extras=True)
            hints.update({n: hint for n, hint in theirs.items() if known.owners.get(n) is function})
    except Exception as error:
        raise ConfigurationError(
            f"The annotations of {task.name} cannot be evaluated ({error}), so there is no schema for them."
        ) from error
    for name, parameter in known.signature.parameters.items():
        if name not in known.owners and parameter.annotation is not parameter.empty:
            hints[name] = parameter.annotation
    return hints


@dataclass(frozen=True)
class Offer:
    """The tasks that an asynchronous adapter offers.

    Args:
        tools: tools by the name that callers use.
        wait: seconds that a call waits for its answer.
    """

    app: Celery
    tools: Mapping[str, Tool]
    wait: float

    async def call(
        self,
        tool: Tool,
        arguments: str | bytes,
        scope: str | None,
        occurrence: str | None,
        idempotency_key: str | None,
        wait: float = math.inf,
    ) -> Receipt:
        """Submit JSON arguments, and wait for the answer, at most as long as the caller wants.

        Raises:
            BadArguments: see ``Tool.parse`` and ``Tool.submit``.
        """
        # Parsing is fast, because requests have a maximum size. Only the store needs a thread.
        given = tool.parse(arguments)
        receipt = await in_thread("submit", tool.submit, given, scope, occurrence, idempotency_key)
        return await receipt.async_wait(min(self.wait, wait))

    async def look(self, key: str, scope: str | None) -> Receipt | None:
        """Return what is known of an intent; None if nothing is, or if its task is not offered.

        Raises:
            StoreError: the store did not answer. The text has the store's address, which a caller must not see.
        """
        if task_of(key) not in {tool.declaration.task for tool in self.tools.values()}:
            return None
        return await in_thread("look", look_up, self.app, key, scope)
