"""A declaration without a Celery task, keys of its calls, and arguments of several types."""

from __future__ import annotations

import dataclasses
import inspect
from datetime import date, datetime, timezone
from enum import Enum
from typing import Any

import pydantic

from celery_idem.core.keys import Declaration, declare

Call = tuple[tuple[Any, ...], dict[str, Any]]


def send(customer_id: Any, invoice_id: Any = "first", *, cents: int = 0, note: str = "") -> None: ...


def a_task(intent: Any = ("customer_id", "invoice_id"), fun: Any = send, **options: Any) -> Declaration:
    return declare("shop.send", inspect.signature(fun), intent, **options)


def key_of(declaration: Declaration, *args: Any, **kwargs: Any) -> str:
    return declaration.key("idem", declaration.bind(args, kwargs))


def key_for(value: Any) -> str:
    """The key of a call whose intent is `value`."""
    return key_of(a_task(("customer_id",)), value)


class Colour(Enum):
    RED = "red"


@dataclasses.dataclass
class Money:
    cents: int
    currency: str = "EUR"


class Invoice(pydantic.BaseModel):
    id: int
    due: date | None = None


NOON = datetime(2026, 11, 1, 12, tzinfo=timezone.utc)
