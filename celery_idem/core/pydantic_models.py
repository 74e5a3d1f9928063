"""Pydantic models as arguments: which values are the caller's, and which are minted by reading them.

Nothing here imports pydantic: a task that uses a model has done so.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from celery_idem.core.errors import IntentError

_CONSTANT = frozenset({bool, bytes, dict, float, frozenset, int, list, set, str, tuple})
"""Factories that make the same value whenever they are called."""

_NOT_VALIDATION = frozenset({"serialization", "metadata", "ref", "schema_ref"})
"""Parts of a core schema that reading a value does not use."""


def is_model(value: Any) -> bool:
    """An instance of pydantic's ``BaseModel``."""
    return getattr(type(value), "__pydantic_root_model__", None) is not None


def is_root(model: Any) -> bool:
    """An instance of pydantic's ``RootModel``: a value with a model around it."""
    return bool(type(model).__pydantic_root_model__)


def fields_of(model: Any) -> dict[str, Any]:
    """The values of a model's fields by name, as Python objects: excluded ones and extra ones too, no computed ones."""
    held = vars(model)
    return {
        **{name: held[name] for name in type(model).model_fields if name in held},
        **(model.__pydantic_extra__ or {}),
    }


class Reader:
    """Reads what callers give for one parameter that is annotated with a model, as Celery's ``pydantic=True`` does.

    Args:
        optional: None stays None.
        strict, context: what Celery validates with.
    """

    def __init__(self, model: Any, optional: bool, strict: bool, context: Mapping[str, Any]) -> None:
        self.model = model
        self.optional = optional
        self.strict = strict
        self.context = dict(context)
        self.runs_code = _any_node(model, _runs_code)
        """Validators may make another value each time."""
        self._mints = _any_node(model, _mints)

    def __call__(self, value: Any) -> Any:
        """The model, without what reading it has minted; a value that is none as it is, since the task refuses it."""
        if isinstance(value, self.model) or (value is None and self.optional):
            return value
        try:
            made = self.model.model_validate(value, strict=self.strict, context=dict(self.context))
        except ValueError:
            return value
        return settled(made) if self._mints else made


def settled(value: Any) -> Any:
    """A copy in which fields that the caller did not send, and whose value a ``default_factory`` made, are missing.

    Raises:
        IntentError: nobody can tell which those are.
    """
    if is_model(value):
        fields = type(value).model_fields
        made = copy.copy(value)  # a model's fields are in its __dict__, and its copy has another one
        kept = {
            name: settled(item)
            for name, item in vars(value).items()
            if name in fields
            and (name in value.model_fields_set or not _is_minting(fields[name].default_factory))
        }
        object.__setattr__(made, "__dict__", kept)
        if value.__pydantic_extra__:
            extra = {name: settled(item) for name, item in value.__pydantic_extra__.items()}
            object.__setattr__(made, "__pydantic_extra__", extra)
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            if field.default_factory is not dataclasses.MISSING and _is_minting(field.default_factory):
                raise IntentError(
                    f"its {type(value).__name__} has a default_factory for {field.name!r}, and a dataclass does not "
                    "tell whether the caller sent a value: make it a model"
                )
            object.__setattr__(made, field.name, settled(getattr(value, field.name)))
        return made
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(settled, value))
    if type(value) in (list, tuple):
        return type(value)(map(settled, value))
    if type(value) is dict:
        return {name: settled(item) for name, item in value.items()}
    if isinstance(value, (set, frozenset)) and any(map(is_model, value)):
        raise IntentError("it has a set of models beside a default_factory: make it a list")
    return value


def _is_minting(factory: Any) -> bool:
    if factory is None or factory in _CONSTANT:
        return False
    # A model's own class: what that mints is missing from it in turn.
    return getattr(factory, "__pydantic_root_model__", None) is None


def _runs_code(node: Mapping[str, Any]) -> bool:
    kind = node.get("type")
    return (
        (isinstance(kind, str) and kind.startswith("function-"))
        or bool(node.get("post_init"))
        or bool(node.get("custom_init"))
    )


def _mints(node: Mapping[str, Any]) -> bool:
    return "default_factory" in node


def _any_node(model: Any, found: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether any node of a model's core schema is of that kind; True where it cannot be read yet."""
    left = [getattr(model, "__pydantic_core_schema__", None)]
    try:
        while left:
            node = left.pop()
            if isinstance(node, Mapping):
                if found(node):
                    return True
                left.extend(part for name, part in node.items() if name not in _NOT_VALIDATION)
            elif isinstance(node, (list, tuple)):
                left.extend(node)
    except Exception:  # a model whose forward references are not there yet
        return True
    return False
