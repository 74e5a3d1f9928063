"""Stores keep bytes by key and have a clock. Each kind is one module here, with the URL schemes that it opens.

Never here: rules.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from celery_idem.core.errors import ConfigurationError
from celery_idem.stores.base import Change, Reply, Store

__all__ = ["Change", "Reply", "Store", "open_server", "open_store", "readable", "schemes"]


@lru_cache(maxsize=1)
def schemes() -> dict[str, ModuleType]:
    """Return the module of each URL scheme.

    A module of this package that names ``SCHEMES`` has ``open_url(url, durability)``. It imports its driver only there.
    """
    modules = [
        importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)
    ]
    return {scheme: module for module in modules for scheme in getattr(module, "SCHEMES", ())}


def open_store(url: str, durability: str = "none") -> Store:
    """Return the store at ``url``. Does not connect yet.

    Args:
        url: ``docs/reference/settings.md`` (``idem_store``) lists the forms.
        durability: what a write waits for (``idem_durability``).

    Raises:
        ConfigurationError: no store has this scheme, or its package is not installed.
    """
    try:
        scheme = urlsplit(url).scheme
    except ValueError:  # its text may show a password
        raise ConfigurationError(
            "idem_store is no URL that can be read. Percent-encode a user or password with special characters "
            "(%5B for [), and write a host by its ASCII name."
        ) from None
    module = schemes().get(scheme)
    if module is None:
        known = ", ".join(f"{name}://" for name in sorted(schemes()))
        # Without :// the text may begin with a password, so it is not shown.
        what = f"no store for {scheme}://" if "://" in url else "this is no URL"
        raise ConfigurationError(f"idem_store: {what}. Use one of {known}.")
    store: Store = module.open_url(url, durability)
    return store


def open_server(options: Mapping[str, Any], durability: str = "none") -> Store:
    """Return the store in a Redis for which connection options are given instead of a URL. Does not connect yet.

    Args:
        options: arguments of redis-py's connection pool, and ``global_keyprefix``. Behind Sentinel also
            ``sentinels`` and ``master_name``.
        durability: as for ``open_store``.

    Raises:
        ConfigurationError: the options contradict each other.
    """
    store: Store = schemes()["sentinel" if "sentinels" in options else "redis"].open_server(
        options, durability
    )
    return store


def readable(url: str) -> None:
    """Check that the password in a Redis or Sentinel URL can be told from the address.

    Raises:
        ConfigurationError: it cannot, so no message may show any part of the URL.
    """
    schemes()["sentinel"].SentinelStore.readable(url)
