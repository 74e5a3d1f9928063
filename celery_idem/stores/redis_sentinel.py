"""The store in the current master of a Redis or Valkey group that sentinels watch.

A connection asks the sentinels for the master when it opens. A failover breaks the open connections; the next call
opens new ones and finds the new master.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.stores.redis import HIDDEN, RedisStore, redact

SCHEMES = ("sentinel",)

SENTINEL_TIMEOUT = 1.0
"""Seconds to wait for one sentinel: it has no other work, and there is another one to ask."""

SENTINEL_PORT = 26379
"""Redis' default port of a sentinel."""


class SentinelStore(RedisStore):
    """Records in the master of a group that sentinels watch.

    Args:
        url: kombu's form, ``sentinel://user:password@host:port;sentinel://host:port/db?master_name=…``.
            User, password and database are those of Redis. Further options as in redis-py's
            URLs, and ``ssl=true``, ``sentinel_username`` and ``sentinel_password``.
        durability: as for one server.
    """

    @staticmethod
    def _shown(url: str) -> str:
        shown, query = [], False
        for part in url.split(";"):
            # A part after a query, or one with no valid port, is no sentinel: it is a piece of a password.
            hidden = (query and "://" not in part) or not _readable(part)
            shown.append(f"sentinel://{HIDDEN}" if hidden else redact(_whole(part)))
            query = query or "?" in part
        return ";".join(shown)

    def _options(self, url: str) -> dict[str, Any]:
        redis_url, sentinels, query = _parsed(url)
        asking: dict[str, Any] = {
            name: query.pop(f"sentinel_{name}")
            for name in ("username", "password")
            if f"sentinel_{name}" in query
        }
        known = {"sentinels": sentinels, "master_name": query.pop("master_name", "")}
        encrypted = query.pop("ssl", "") == "true"
        if encrypted:
            asking["ssl"] = True
        options = super()._options(f"{redis_url}?{urlencode(query)}" if query else redis_url)
        return {**options, **known, "ssl": encrypted, "sentinel_kwargs": asking}

    def _open_pool(self, options: dict[str, Any]) -> Any:
        from redis.sentinel import Sentinel, SentinelConnectionPool

        master = options.pop("master_name", "")
        if not master:
            raise ConfigurationError(
                f"idem_store: {self.url} does not name the master. Add ?master_name=…, or set it in "
                "result_backend_transport_options where the result backend is the store."
            )
        for name in ("host", "port"):  # the sentinels give them
            options.pop(name, None)
        asking = {
            "socket_timeout": SENTINEL_TIMEOUT,
            "socket_connect_timeout": SENTINEL_TIMEOUT,
            "retry": options["retry"],
            **(options.pop("sentinel_kwargs", None) or {}),
        }
        least = options.pop("min_other_sentinels", 0)
        manager = Sentinel(options.pop("sentinels"), min_other_sentinels=least, sentinel_kwargs=asking)
        return SentinelConnectionPool(master, manager, **options)

    def _silence(self, error: Exception) -> StoreError:
        self.close()  # this server may not be the master any more: the next call asks the sentinels
        if isinstance(error, self._redis.sentinel.MasterNotFoundError):  # its text shows the clients' options
            return StoreError(
                f"The store {self.url} did not answer: no sentinel there answers and knows a healthy master "
                f"{self._pool.service_name!r}."
            )
        return super()._silence(error)


def _parsed(url: str) -> tuple[str, list[tuple[str, int]], dict[str, str]]:
    """Return the redis:// URL with user, password and database, the sentinels, and the options."""
    sentinels = []
    user, path = "", ""
    query: dict[str, str] = {}
    for part in url.split(";"):
        parts = urlsplit(_whole(part))
        sentinels.append((parts.hostname or "localhost", parts.port or SENTINEL_PORT))
        user = user or parts.netloc.rpartition("@")[0]
        path = path or parts.path
        query |= {name: values[0] for name, values in parse_qs(parts.query).items()}
    return f"redis://{user}@localhost{path}" if user else f"redis://localhost{path}", sentinels, query


def _whole(part: str) -> str:
    return part if "://" in part else f"sentinel://{part}"


def _readable(part: str) -> bool:
    try:
        _ = urlsplit(_whole(part)).port
    except ValueError:
        return False
    return True


def open_url(url: str, durability: str = "none") -> SentinelStore:
    """Return the store for kombu's form of a Sentinel URL."""
    return SentinelStore(url, durability)


def open_server(options: Mapping[str, Any], durability: str = "none") -> SentinelStore:
    """Return the store for arguments of redis-py's connection pool, ``sentinels`` and ``master_name``."""
    shown = ";".join(f"sentinel://{host}:{port}" for host, port in options["sentinels"])
    return SentinelStore(f"{shown}/{options.get('db', 0)}", durability, options)
