"""Decorators as users write them: they add parameters to a body, or fill them in."""

from __future__ import annotations

import functools
from typing import Any


def passing(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


def with_session(fn: Any) -> Any:
    """Fills in the first argument."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn("session", *args, **kwargs)

    return wrapper


def with_named_session(fn: Any) -> Any:
    """Fills in the parameter `session` by name."""

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, session="session", **kwargs)

    return wrapper


def traced(fn: Any) -> Any:
    """Takes one more parameter, by name."""

    @functools.wraps(fn)
    def wrapper(*args: Any, trace: Any = None, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


def for_tenant(fn: Any) -> Any:
    """Takes one more parameter, by position."""

    @functools.wraps(fn)
    def wrapper(tenant: Any, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper
