"""Opening a store by its URL."""

from __future__ import annotations

import importlib
from urllib.parse import urlsplit

from celery_idem.errors import ConfigurationError
from celery_idem.stores.base import Change, Reply, Store

__all__ = ["Change", "Reply", "Store", "open_store"]

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
    scheme = urlsplit(url).scheme
    target = _OPENERS.get(scheme)
    if target is None:
        known = ", ".join(f"{name}://" for name in sorted(_OPENERS))
        raise ConfigurationError(f"idem_store: no store for {scheme or url!r}://. Use one of {known}.")
    module, _, function = target.partition(":")
    store: Store = getattr(importlib.import_module(module), function)(url, durability)
    return store
