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
from celery_idem.integration.settings import Settings, of_app
from celery_idem.stores import Store, open_server, open_store, readable

if TYPE_CHECKING:
    from celery import Celery

_stores: dict[tuple[str, str], Store] = {}
"""Stores by URL: one set of connections per process, however many applications and tasks."""

_backends: weakref.WeakKeyDictionary[Any, dict[str, Store]] = weakref.WeakKeyDictionary()
"""Applications' result backends as stores, by durability."""


def store_of(settings: Settings, app: Celery) -> Store:
    """The store these settings name, else the application's Redis result backend; opened once per process.

    Raises:
        ConfigurationError: neither is there.
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
    """Whether the store is the database of the application's result backend: opened from its settings, or named
    by a URL with the same address."""
    if any(opened is store for opened in _backends.get(app, {}).values()):
        return True
    try:
        return store.is_at(app.backend.connparams)
    except Exception:  # no result backend, or one without such parameters
        return False


def _backend_as_store(app: Celery, durability: str) -> Store:
    """The server of the result backend, with all that Celery knows of how to connect to it.

    Read from Celery's own backend object, and so after its rules: its URL, ``redis_*``,
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
    except Exception as error:  # of a URL, a credential provider; its text may show parts of them
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
    # Celery's default is two minutes, for results. A claim, and with it the worker's slot, does not wait so long.
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
    """Say that a port is none, where it cannot be half of a password that the URL does not quote."""
    for part in url.split(";"):
        try:
            parts = urlsplit(part if "://" in part else f"//{part}")
            quoted = "@" not in f"{parts.path}{parts.query}{parts.fragment}"
        except ValueError:
            continue
        try:
            _ = parts.port
        except ValueError:
            # not shown: it may be a password without a host
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
    """How results are written: as the application's result backend writes them, and sealed where there are keys.

    Raises:
        ConfigurationError: there are, and the package ``cryptography`` is missing.
    """
    serializer = conf.get("result_serializer") or "json"
    accept = conf.get("result_accept_content") or conf.get("accept_content") or ("json",)
    json = getattr(registry, "_encoders", {}).get("json")
    kombus_json = json is None or json.encoder is kombu_json.dumps
    accepted, seal = frozenset(map(_short_name, accept)), seal_of(tuple(settings.seal_keys))
    return Codec(serializer, accepted, settings.max_result_bytes, kombus_json, seal)


def _short_name(name: str) -> str:
    """kombu's name of a serializer, which may be given as a content type."""
    guess = name.rpartition("/")[2].removeprefix("x-").replace("python-serialize", "pickle")
    return str(registry.type_to_name.get(name, guess))


class Ledger(engine.Ledger):
    """All intents of one application; see ``celery_idem.engine.ledger``."""

    @classmethod
    def from_app(cls, app: Celery) -> Ledger:
        """The ledger that an application's tasks use.

        Raises:
            ConfigurationError: a setting is wrong.
        """
        return ledger_of(app)


_ledgers: weakref.WeakKeyDictionary[Any, Ledger] = weakref.WeakKeyDictionary()


def ledger_of(app: Celery, settings: Settings | None = None) -> Ledger:
    """An application's ledger.

    Args:
        settings: of one task, where they differ from the application's.
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
    """What publishes the call of an intent that was decided by hand, so that its caller gets the outcome."""

    def of_call(key: str, packed: bytes) -> Callable[[], object] | None:
        alive = app()
        return None if alive is None else messages.publisher(alive, key, packed)

    return of_call


def _result_ttl(app: weakref.ref[Any], default: float) -> Callable[[str], float]:
    """How long outcomes of a task are kept: its own setting, where the application knows the task."""

    def of_task(name: str) -> float:
        alive = app()
        task: Any = alive.tasks.get(name) if alive is not None else None
        return (
            default
            if getattr(task, "idem_declaration", None) is None
            else float(task.guard.settings.result_ttl)
        )

    return of_task
