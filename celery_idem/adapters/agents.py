"""For agent frameworks: a task as a plain function with types and descriptions, which a framework turns into a tool.

::

    from celery_idem.adapters.agents import function

    send_invoice = async_function(celery_app, "shop.send_invoice", scope="acme")

    StructuredTool.from_function(coroutine=send_invoice)   # LangChain, LangGraph
    function_tool(send_invoice)                            # OpenAI Agents SDK
    Agent(…, tools=[send_invoice])                         # pydantic-ai

The function never raises, because frameworks answer an exception with "please try again". It returns the receipt as a
dictionary. ``function`` makes one that blocks while it waits, for programs without an event loop. Frameworks run it in
a thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from celery_idem.adapters.tools import BadArguments, Tool, annotations_of, tool_of
from celery_idem.integration.awaiting import in_thread, warn_on_loop
from celery_idem.integration.receipts import Receipt

if TYPE_CHECKING:
    from celery import Celery

T = TypeVar("T")

Whose = str | Callable[[], str | None] | None
"""A scope, or a function that returns it."""

WAIT = 30.0
"""Seconds to wait for the answer: ``Receipt.wait``'s own."""


def function(
    app: Celery, task: str, *, scope: Whose = None, occurrences: bool = False, wait: float = WAIT
) -> Callable[..., dict[str, Any]]:
    """Return a function that submits the task and waits for its answer.

    Its name, docstring, signature and annotations are those of the task. Each annotation also describes the
    parameter's role, for a model to read.

    Args:
        scope: whose action it is: a text, or a function that returns it (a ``ContextVar``'s ``get``). It is never an
            argument, because a model could choose that.
        occurrences: let the model name an intended repetition (see ``tool_of``).
        wait: seconds to wait.

    Raises:
        ConfigurationError: the task cannot be offered.
    """
    tool, submit = _submitting(app, task, scope, occurrences)

    def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        warn_on_loop("This function", "adapters.agents.async_function")
        return submit(args, kwargs).wait(wait).to_dict()

    return _like_the_task(call, tool)


def async_function(
    app: Celery, task: str, *, scope: Whose = None, occurrences: bool = False, wait: float = WAIT
) -> Callable[..., Coroutine[Any, Any, dict[str, Any]]]:
    """As ``function``, with a coroutine function that does not block the event loop."""
    tool, submit = _submitting(app, task, scope, occurrences)

    async def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
        receipt = await in_thread("submit", submit, args, kwargs)
        return (await receipt.async_wait(wait)).to_dict()

    return _like_the_task(call, tool)


def _submitting(
    app: Celery, task: str, scope: Whose, occurrences: bool
) -> tuple[Tool, Callable[[Any, Any], Receipt]]:
    tool = tool_of(app, task, occurrences)
    signature = _signature(tool)

    def submit(args: Any, kwargs: Any) -> Receipt:
        whose = scope() if callable(scope) else scope
        try:
            return tool.submit(_named(signature, args, kwargs), whose)
        except BadArguments as error:
            return Receipt("failed", "", reason=str(error), code="invalid")

    return tool, submit


def _like_the_task(call: Callable[..., T], tool: Tool) -> Callable[..., T]:
    signature = _signature(tool)
    call.__name__ = call.__qualname__ = tool.name.replace(".", "_")
    call.__doc__ = tool.description
    call.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    call.__annotations__["return"] = dict[str, Any]
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _signature(tool: Tool) -> inspect.Signature:
    from pydantic import Field

    words = {name: entry.get("description") for name, entry in tool.schema()["properties"].items()}
    hints = annotations_of(tool.task)
    parameters = []
    for name, parameter in tool.declaration.signature.parameters.items():
        hint = hints.get(name, Any)
        if words.get(name):
            hint = Annotated[hint, Field(description=words[name])]
        kind = parameter.kind
        if kind is inspect.Parameter.POSITIONAL_ONLY:
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD  # a tool's arguments have names
        parameters.append(parameter.replace(kind=kind, annotation=hint))
    if tool.occurrences:
        hint = Annotated[str | None, Field(description=words["occurrence"])]
        kind = inspect.Parameter.KEYWORD_ONLY
        extra = inspect.Parameter("occurrence", kind, default=None, annotation=hint)
        parameters.append(extra)
        parameters.sort(key=lambda each: each.kind)  # only **kwargs may follow it
    return inspect.Signature(parameters, return_annotation=dict[str, Any])


def _named(signature: inspect.Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise BadArguments([str(error)]) from None
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments
