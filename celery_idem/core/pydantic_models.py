"""Reads pydantic models in arguments, and removes values that validation generated.

Does not import pydantic: a task that uses a model has imported it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from celery_idem.core.errors import IntentError

_CONSTANT = frozenset({bool, bytes, dict, float, frozenset, int, list, set, str, tuple})
"""Factories that always return the same value."""

_NOT_VALIDATION = frozenset({"serialization", "metadata", "ref", "schema_ref"})
"""Parts of a core schema that validation does not use."""


def is_model(value: Any) -> bool:
    """Tell whether it is an instance of pydantic's ``BaseModel``."""
    return getattr(type(value), "__pydantic_root_model__", None) is not None


def fields_of(model: Any) -> dict[str, Any]:
    """Return a model's fields by name, with excluded and extra fields and without computed ones."""
    held = vars(model)
    return {
        **{name: held[name] for name in type(model).model_fields if name in held},
        **(model.__pydantic_extra__ or {}),
    }


class Reader:
    """Reads the argument of a parameter that is annotated with a model, as Celery's ``pydantic=True`` does.

    Args:
        optional: None is allowed.
        strict, context: Celery's options of validation.
    """

    def __init__(self, model: Any, optional: bool, strict: bool, context: Mapping[str, Any]) -> None:
        self.model = model
        self.optional = optional
        self.strict = strict
        self.context = dict(context)
        self.runs_code = _any_node(model, _runs_code)
        """Its validators may return another value each time."""
        self._generates = _any_node(model, _generates)

    def __call__(self, value: Any) -> Any:
        """Return the model without generated values. An invalid value is returned as it is: the task refuses it."""
        if isinstance(value, self.model) or (value is None and self.optional):
            return value
        try:
            made = self.model.model_validate(value, strict=self.strict, context=dict(self.context))
        except ValueError:
            return value
        return settled(made) if self._generates else made


def settled(value: Any) -> Any:
    """Return a copy without the fields that a ``default_factory`` generated.

    Raises:
        IntentError: it is not known which fields were generated.
    """
    if is_model(value):
        fields = type(value).model_fields
        made = copy.copy(value)  # the copy has its own __dict__, where the fields are
        kept = {
            name: settled(item)
            for name, item in vars(value).items()
            if name in fields
            and (name in value.model_fields_set or not _is_generator(fields[name].default_factory))
        }
        object.__setattr__(made, "__dict__", kept)
        if value.__pydantic_extra__:
            extra = {name: settled(item) for name, item in value.__pydantic_extra__.items()}
            object.__setattr__(made, "__pydantic_extra__", extra)
        return made
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in dataclasses.fields(value):
            if field.default_factory is not dataclasses.MISSING and _is_generator(field.default_factory):
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


def _is_generator(factory: Any) -> bool:
    if factory is None or factory in _CONSTANT:
        return False
    # A model class is fine: its own generated fields are removed as well.
    return getattr(factory, "__pydantic_root_model__", None) is None


def _runs_code(node: Mapping[str, Any]) -> bool:
    kind = node.get("type")
    return (
        (isinstance(kind, str) and kind.startswith("function-"))
        or bool(node.get("post_init"))
        or bool(node.get("custom_init"))
    )


def _generates(node: Mapping[str, Any]) -> bool:
    return "default_factory" in node


def _any_node(model: Any, found: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Tell whether any node of a model's core schema is of that kind; True if it cannot be read yet."""
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
    except Exception:  # the model's forward references are not resolved yet
        return True
    return False
