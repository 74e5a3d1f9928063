"""Bytes by key, and a clock: one file for each kind of store, and the function that opens one by its URL.

Never here: rules.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from celery_idem.core.errors import ConfigurationError
from celery_idem.stores.base import Change, Reply, Store

__all__ = ["Change", "Reply", "Store", "open_server", "open_store", "readable"]

_OPENERS = {
    "memory": "celery_idem.stores.memory:open_memory",
    "redis": "celery_idem.stores.redis:open_redis",
    "rediss": "celery_idem.stores.redis:open_redis",
    "redis+socket": "celery_idem.stores.redis:open_redis",
    "unix": "celery_idem.stores.redis:open_redis",
    "sentinel": "celery_idem.stores.redis_sentinel:open_sentinel",
    "redis-cluster": "celery_idem.stores.redis_cluster:open_cluster",
    "rediss-cluster": "celery_idem.stores.redis_cluster:open_cluster",
    "sqlite": "celery_idem.stores.sql:open_sql",
    "postgresql": "celery_idem.stores.sql:open_sql",
    "postgresql+psycopg": "celery_idem.stores.sql:open_sql",
}


def open_store(url: str, durability: str = "none") -> Store:
    """The store at ``url``. Connects to nothing yet.

    Args:
        url: see ``docs/reference/settings.md`` (``idem_store``) for the forms.
        durability: what a write waits for (``idem_durability``).

    Raises:
        ConfigurationError: no store has this kind of URL, or it lacks a package.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its text would show what it could not read
        raise ConfigurationError(
            "idem_store is no URL that can be read. Percent-encode a user or password with special characters "
            "(%5B for [), and write a host by its ASCII name."
        ) from None
    target = _OPENERS.get(scheme)
    if target is None:
        known = ", ".join(f"{name}://" for name in sorted(_OPENERS))
        what = (
            f"no store for {scheme}://" if "://" in url else "this is no URL"
        )  # it may begin with a password
        raise ConfigurationError(f"idem_store: {what}. Use one of {known}.")
    module, _, function = target.partition(":")
    store: Store = getattr(importlib.import_module(module), function)(url, durability)
    return store


def open_server(options: Mapping[str, Any], durability: str = "none") -> Store:
    """The store in a Redis whose connections are known, and not its URL. Connects to nothing yet.

    Args:
        options: arguments of redis-py's connection pool, and ``global_keyprefix``; behind Sentinel also
            ``sentinels`` and ``master_name``.
        durability: as for ``open_store``.

    Raises:
        ConfigurationError: they do not fit together.
    """
    name = "redis_sentinel" if "sentinels" in options else "redis"
    store: Store = importlib.import_module(f"celery_idem.stores.{name}").open_server(options, durability)
    return store


def readable(url: str) -> None:
    """Look at the URL of a Redis, or of several sentinels.

    Raises:
        ConfigurationError: its password cannot be told from its address, so no text may show any of it.
    """
    importlib.import_module("celery_idem.stores.redis_sentinel").SentinelStore.readable(url)
