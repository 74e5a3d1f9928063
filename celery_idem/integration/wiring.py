"""Builds stores and ledgers from an application, each once per process."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kombu.serialization import registry
from kombu.utils import json as kombu_json

from celery_idem.core.errors import ConfigurationError
from celery_idem.core.results import Codec
from celery_idem.core.sealing import seal_of
from celery_idem.engine import ledger as engine
from celery_idem.integration import messages
from celery_idem.integration.guarded import guarded_task
from celery_idem.integration.settings import Settings, of_app
from celery_idem.stores import Store, open_server, open_store, readable

if TYPE_CHECKING:
    from celery import Celery

_stores: dict[tuple[str, str], Store] = {}
"""Stores by URL and durability: one set of connections per process for all applications and tasks."""

_backends: weakref.WeakKeyDictionary[Any, dict[str, Store]] = weakref.WeakKeyDictionary()
"""Applications' result backends as stores, by durability."""


def store_of(settings: Settings, app: Celery) -> Store:
    """Return the store that the settings name, or else the application's Redis result backend. Opened once per process.

    Raises:
        ConfigurationError: there is neither.
    """
    if settings.store:
        place = (settings.store, settings.durability)
        store = _stores.get(place)
        return store if store is not None else _stores.setdefault(place, open_store(*place))
    opened = _backends.setdefault(app, {})
    if settings.durability not in opened:
        opened[settings.durability] = _backend_as_store(app, settings.durability)
    return opened[settings.durability]


def is_backends(store: Store, app: Celery) -> bool:
    """Whether a store is the database of the application's result backend, by its settings or by the same address."""
    if any(opened is store for opened in _backends.get(app, {}).values()):
        return True
    try:
        return store.is_at(app.backend.connparams)
    except Exception:  # no result backend, or one without such parameters
        return False


def _backend_as_store(app: Celery, durability: str) -> Store:
    """Return the result backend's server as a store, with the same connection parameters.

    They are read from Celery's own backend object, so Celery's rules apply: its URL, ``redis_*``,
    ``redis_backend_use_ssl``, ``result_backend_transport_options``, the environment, the command line.
    """
    from celery.app.defaults import DEFAULTS
    from celery.backends.redis import RedisBackend, SentinelBackend

    url = app.conf.result_backend
    if isinstance(url, str) and url.startswith(("redis", "sentinel")):
        _check_ports(url)
        readable(url)
    try:
        backend = app.backend
    except Exception as error:  # of a URL or a credential provider; its text may show a password
        raise _no_store(f"cannot be opened ({type(error).__name__})") from None
    if not isinstance(backend, RedisBackend):
        raise _no_store("is not a Redis it could use")
    kind = type(backend)
    made_by = kind._get_pool, kind._create_client, kind.client
    theirs = [(one._get_pool, one._create_client, one.client) for one in (RedisBackend, SentinelBackend)]
    if made_by not in theirs or not issubclass(backend.ConnectionPool, backend.redis.ConnectionPool):
        raise _no_store(f"({kind.__name__}) makes its connections in a way of its own")
    options = app.conf.get("result_backend_transport_options") or {}
    values = {**backend.connparams, "global_keyprefix": options.get("global_keyprefix")}
    # Celery's default for results is two minutes. A claim, which holds a worker slot, must not wait so long.
    if values.get("socket_timeout") == DEFAULTS["redis_socket_timeout"]:
        del values["socket_timeout"]
    if not isinstance(backend, SentinelBackend):
        return open_server(values, durability)
    hosts = values.pop("hosts")
    values["sentinels"] = [(host["host"], int(host["port"])) for host in hosts]
    values["master_name"] = next((host["master_name"] for host in hosts if host.get("master_name")), None)
    for name in ("master_name", "sentinel_kwargs", "min_other_sentinels"):
        if options.get(name) is not None:
            values[name] = options[name]
    return open_server(values, durability)


def _check_ports(url: str) -> None:
    """Refuse a wrong port in a URL, unless it may be a part of a password that is not quoted."""
    for part in url.split(";"):
        try:
            parts = urlsplit(part if "://" in part else f"//{part}")
            quoted = "@" not in f"{parts.path}{parts.query}{parts.fragment}"
        except ValueError:
            continue
        try:
            _ = parts.port
        except ValueError:
            # The text after the last colon may be a password, if the URL has no host.
            if quoted and (";" not in url or "@" not in url):
                raise ConfigurationError(
                    "result_backend: the port in its URL is no number from 0 to 65535, so it cannot be the store. "
                    "Correct it, or set idem_store."
                ) from None


def _no_store(why: str) -> ConfigurationError:
    return ConfigurationError(
        f"celery_idem needs a store to keep its records in, and the result backend {why}. "
        'Set idem_store, for example app.conf.idem_store = "redis://localhost:6379/1".'
    )


def codec_of(settings: Settings, conf: Mapping[str, Any]) -> Codec:
    """Return the codec of results: as the application's result backend writes them, and sealed if there are keys.

    Raises:
        ConfigurationError: there are keys, and the package ``cryptography`` is missing.
    """
    serializer = conf.get("result_serializer") or "json"
    accept = conf.get("result_accept_content") or conf.get("accept_content") or ("json",)
    json = getattr(registry, "_encoders", {}).get("json")
    kombus_json = json is None or json.encoder is kombu_json.dumps
    accepted, seal = frozenset(map(_short_name, accept)), seal_of(tuple(settings.seal_keys))
    return Codec(serializer, accepted, settings.max_result_bytes, kombus_json, seal)


def _short_name(name: str) -> str:
    """Return kombu's name of a serializer that may be given as a content type."""
    guess = name.rpartition("/")[2].removeprefix("x-").replace("python-serialize", "pickle")
    return str(registry.type_to_name.get(name, guess))


class Ledger(engine.Ledger):
    """All intents of one application; see ``celery_idem.engine.ledger``."""

    @classmethod
    def from_app(cls, app: Celery) -> Ledger:
        """Return the ledger that an application's tasks use.

        Raises:
            ConfigurationError: a setting is wrong.
        """
        return ledger_of(app)


_ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()


def ledger_of(app: Celery, settings: Settings | None = None) -> Ledger:
    """Return an application's ledger.

    Args:
        settings: settings of one task; None: the application's.
    """
    ledger: Ledger | None
    if settings is not None:
        keep = settings.result_ttl
        codec = codec_of(settings, app.conf)
        ledger = Ledger(store_of(settings, app), settings.namespace, codec, lambda task: keep)
        ledger.teller = _teller(weakref.ref(app))
        return ledger
    ledger = _ledgers.get(app)
    if ledger is None:
        settings = of_app(app.conf)
        ledger = _ledgers[app] = ledger_of(app, settings)
        ledger.result_ttl = _result_ttl(weakref.ref(app), settings.result_ttl)
    return ledger


def _teller(app: weakref.ref[Any]) -> engine.Teller:
    """Return what publishes the call of an intent that a person decided, so that its caller gets the outcome."""

    def of_call(key: str, packed: bytes) -> Callable[[], object] | None:
        alive = app()
        return None if alive is None else messages.publisher(alive, key, packed)

    return of_call


def _result_ttl(app: weakref.ref[Any], default: float) -> Callable[[str], float]:
    """Return a function: how long a task's outcomes are kept, by its own setting if the application has the task."""

    def of_task(name: str) -> float:
        alive = app()
        task = None if alive is None else guarded_task(alive, name)
        return default if task is None else task.guard.settings.result_ttl

    return of_task
