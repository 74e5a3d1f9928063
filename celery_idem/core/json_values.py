"""kombu's JSON, extended so that values that look like kombu's type marks survive."""

from __future__ import annotations

from json import JSONDecoder
from typing import Any

from kombu.utils import json as kombu_json

_TO_JSON = kombu_json.JSONEncoder()
_MARKS = {"__type__", "__value__"}
"""Keys of the dictionaries that kombu's JSON writes for dates, UUIDs and other types."""

_LITERAL = "idem:dict"
"""Type mark of a dictionary that only looks like one of those; its two values follow."""


def _from_mark(found: dict[str, Any]) -> Any:
    """Decode our mark, and leave the others to kombu's object hook."""
    if len(found) != 2 or found.keys() != _MARKS:
        return found
    if found["__type__"] == _LITERAL:
        return dict(zip(("__type__", "__value__"), found["__value__"], strict=True))
    return kombu_json.object_hook(found)


FROM_JSON = JSONDecoder(object_hook=_from_mark)
"""``kombu.utils.json`` makes a decoder for each value. One is enough: it keeps no state."""


def to_json(value: Any) -> str:
    text: str = _TO_JSON.encode(value)
    if '"__type__"' in text:  # kombu's marks, or a value that looks like one
        literal = _literal(value)
        if literal is not value:
            text = _TO_JSON.encode(literal)
    return text


def _literal(value: Any) -> Any:
    """Return the value with our mark on dictionaries that look like kombu's marks."""
    if isinstance(value, dict):
        new = {name: _literal(item) for name, item in value.items()}
        if new.keys() == _MARKS:
            return {"__type__": _LITERAL, "__value__": [new["__type__"], new["__value__"]]}
        return new if any(new[name] is not item for name, item in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [_literal(item) for item in value]
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
