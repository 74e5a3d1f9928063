"""JSON as kombu writes it, in which a value that imitates kombu's type marks comes back as it was."""

from __future__ import annotations

from json import JSONDecoder
from typing import Any

from kombu.utils import json as kombu_json

_TO_JSON = kombu_json.JSONEncoder()
_MARKS = {"__type__", "__value__"}
"""Keys of the dictionaries in which kombu's JSON keeps a date, a UUID and the like."""

_LITERAL = "idem:dict"
"""The mark of a dictionary that only looks like one of those: its two values follow."""


def _from_mark(found: dict[str, Any]) -> Any:
    """kombu's object hook, and what it would take for a mark of its own."""
    if len(found) != 2 or found.keys() != _MARKS:
        return found
    if found["__type__"] == _LITERAL:
        return dict(zip(("__type__", "__value__"), found["__value__"], strict=True))
    return kombu_json.object_hook(found)


FROM_JSON = JSONDecoder(object_hook=_from_mark)
"""What ``kombu.utils.json`` makes anew for each value. They keep nothing between values."""


def to_json(value: Any) -> str:
    text: str = _TO_JSON.encode(value)
    if '"__type__"' in text:  # marks, or a value that imitates them
        literal = _literal(value)
        if literal is not value:
            text = _TO_JSON.encode(literal)
    return text


def _literal(value: Any) -> Any:
    """The same value, with dictionaries that would be read as marks marked themselves."""
    if isinstance(value, dict):
        new = {name: _literal(item) for name, item in value.items()}
        if new.keys() == _MARKS:
            return {"__type__": _LITERAL, "__value__": [new["__type__"], new["__value__"]]}
        return new if any(new[name] is not item for name, item in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [_literal(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
