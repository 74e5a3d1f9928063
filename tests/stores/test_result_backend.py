"""The result backend's server as the store: the store connects with all of Celery's settings for it."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from typing import Any

import celery
import pytest
from celery import Celery
from celery.backends.redis import RedisBackend, SentinelBackend
from redis import CredentialProvider, SSLConnection

from celery_idem.core.errors import ConfigurationError
from celery_idem.engine.ledger import Ledger
from celery_idem.integration.settings import Settings
from celery_idem.integration.wiring import ledger_of, store_of
from celery_idem.operate.operators import Operator
from celery_idem.stores import open_store
from celery_idem.stores.redis import TIMEOUT, RedisStore
from celery_idem.stores.redis_sentinel import SentinelStore
from tests.conftest import running
from tests.stores.servers import client, tls
from tests.support.servers import RedisServer

MINE = b"owner-mine--"


def an_app(backend: Any = None, **conf: Any) -> Celery:
    app = Celery("shop", backend=backend, set_as_current=False)
    app.conf.update(conf)
    return app


def store_for(app: Celery, durability: str = "none") -> RedisStore:
    store = store_of(Settings(durability=durability), app)
    assert isinstance(store, RedisStore)
    return store


def connects_with(app: Celery) -> dict[str, Any]:
    store = store_for(app)
    return {**store._pool.connection_kwargs, "connection_class": store._pool.connection_class}


class Provider(CredentialProvider):
    def get_credentials(self) -> tuple[str, str]:
        return "shop", "s3cret"


class Alike(RedisBackend):  # type: ignore[misc]
    """A subclass that changes nothing about connections."""


class Apart(RedisBackend):  # type: ignore[misc]
    def _get_pool(self, **params: Any) -> Any:
        raise NotImplementedError


class Pooled(SentinelBackend):  # type: ignore[misc]
    def _create_client(self, **params: Any) -> Any:
        raise NotImplementedError


NONE = {"ssl_cert_reqs": ssl.CERT_NONE}
TAKEN: dict[str, tuple[Celery, dict[str, Any]]] = {
    "the URL": (
        an_app("redis://me:s3%23cret@host:1/2?socket_timeout=7"),
        {"host": "host", "port": 1, "db": 2, "username": "me", "password": "s3#cret", "socket_timeout": 7.0},
    ),
    "single settings": (
        an_app(
            "redis",
            redis_host="host",
            redis_port=1,
            redis_db=2,
            redis_username="me",
            redis_password="s3cret",
            redis_socket_timeout=3,
            redis_socket_connect_timeout=2,
            redis_socket_keepalive=True,
        ),
        {
            "host": "host",
            "port": 1,
            "db": 2,
            "username": "me",
            "password": "s3cret",
            "socket_timeout": 3.0,
            "socket_connect_timeout": 2.0,
            "socket_keepalive": True,
        },
    ),
    "no timeout, and Celery's own": (
        an_app("redis://host"),
        {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT},
    ),
    "TLS by a setting": (
        an_app("rediss://host", redis_backend_use_ssl={**NONE, "ssl_ca_certs": "/ca.pem"}),
        {"connection_class": SSLConnection, "ssl_cert_reqs": ssl.CERT_NONE, "ssl_ca_certs": "/ca.pem"},
    ),
    "TLS by a setting, without the s": (
        an_app("redis://host", redis_backend_use_ssl=NONE),
        {"connection_class": SSLConnection, "ssl_cert_reqs": ssl.CERT_NONE},
    ),
    "TLS by the URL": (
        an_app("rediss://host?ssl_cert_reqs=CERT_OPTIONAL&ssl_ca_certs=%2Fca.pem"),
        {"connection_class": SSLConnection, "ssl_cert_reqs": ssl.CERT_OPTIONAL, "ssl_ca_certs": "/ca.pem"},
    ),
    "a socket": (
        an_app("redis+socket:///run/redis.sock?virtual_host=3"),
        {"path": "/run/redis.sock", "db": 3},
    ),
    "a class": (an_app(Alike, redis_host="host"), {"host": "host"}),
}


NEWER = pytest.mark.skipif(celery.VERSION < (5, 7), reason="the backend of this Celery cannot do that")
"""Marks options that the result backend of older versions of Celery does not have."""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=NEWER if what in ("a class", "TLS by a setting, without the s") else ())
        for what in TAKEN
    ],
)
def test_what_celery_knows_of_the_connection_is_taken_over(what: str) -> None:
    app, expected = TAKEN[what]
    given = connects_with(app)
    assert {name: given.get(name) for name in expected} == expected
    assert "s3" not in store_for(app).url


@NEWER
@pytest.mark.parametrize(
    "app",
    [
        an_app("redis://host", redis_backend_credential_provider=Provider()),
        an_app(f"redis://host?credential_provider={__name__}.Provider"),
    ],
)
def test_credentials_may_come_from_a_provider(app: Celery) -> None:
    given = connects_with(app)
    assert isinstance(given["credential_provider"], Provider)
    assert not {"username", "password"} & set(given)


def test_behind_sentinels() -> None:
    app = an_app("sentinel://me:s3cret@a:1;sentinel://b:2/3", redis_backend_use_ssl=NONE)
    app.conf.result_backend_transport_options = {
        "master_name": "shop",
        "sentinel_kwargs": {"password": "hush", "socket_timeout": 0.5},
        "min_other_sentinels": 1,
        "global_keyprefix": "staging",
    }
    store = store_for(app)
    assert isinstance(store, SentinelStore)
    assert (store._pool.service_name, store.prefix) == ("shop", "staging_")
    given, manager = connects_with(app), store._pool.sentinel_manager
    assert given.get("username") == ("me" if celery.VERSION >= (5, 7) else None)
    assert (given["password"], given["ssl_cert_reqs"]) == ("s3cret", ssl.CERT_NONE)
    assert issubclass(given["connection_class"], SSLConnection)
    asked = [one.connection_pool.connection_kwargs for one in manager.sentinels]
    assert [(one["host"], one["port"], one["password"], one["socket_timeout"]) for one in asked] == [
        ("a", 1, "hush", 0.5),
        ("b", 2, "hush", 0.5),
    ]
    assert manager.min_other_sentinels == 1
    assert "s3cret" not in store.url


@pytest.mark.parametrize(
    ("app", "says"),
    [
        (an_app(), "is not a Redis"),
        (an_app("rpc://"), "is not a Redis"),
        pytest.param(an_app(Apart), "Apart", marks=NEWER),
        pytest.param(an_app(Pooled), "Pooled", marks=NEWER),
        (an_app("rediss://host"), "cannot be opened"),  # Celery refuses it: ssl_cert_reqs is missing
        (an_app("redis://:s3cret/x@host"), "Percent-encode"),
        (an_app("redis://:s3cret#x@host"), "Percent-encode"),
        (an_app("redis://:s3cret@host:x/0"), "the port in its URL is no number"),
        (an_app("redis://host:99999/0"), "the port in its URL is no number"),
        (an_app("sentinel://a:x;sentinel://b/0"), "the port in its URL is no number"),
        pytest.param(an_app("redis://host?credential_provider=none.such"), "cannot be opened", marks=NEWER),
    ],
)
def test_what_cannot_be_taken_over_is_refused(app: Celery, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        store_of(Settings(), app)
    assert "idem_store" in str(caught.value)
    assert "s3cret" not in str(caught.value) + repr(caught.value.__cause__)


def test_a_sentinel_backend_without_a_masters_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="result_backend_transport_options"):
        store_of(Settings(), an_app("sentinel://a:1/0"))


def test_a_durability_of_its_own_is_a_store_of_its_own() -> None:
    app = an_app("redis://host")
    assert store_for(app) is store_for(app)
    assert store_for(app, "fsync") is not store_for(app)


# --- the prefix ----------------------------------------------------------------------------------


@pytest.mark.redis
def test_applications_with_other_prefixes_do_not_see_each_other(redis_url: str) -> None:
    """For example staging and production in one database. The prefix may be a setting or in the URL."""
    apps = {
        name: an_app(redis_url, result_backend_transport_options={"global_keyprefix": name})
        for name in ("staging:", "production:")
    }
    ledgers = [ledger_of(app) for app in apps.values()]
    ledgers.append(Ledger(open_store(f"{redis_url}?global_keyprefix=third"), "idem"))
    for ledger in ledgers:
        created = ledger.store.create("idem:a", MINE)
        assert created.done
        assert created.stored is not None
        assert ledger.store.create("idem:a", MINE + b"2").stored == created.stored
        assert ledger.store.replace("idem:a", created.stored, MINE + b"3").done
        assert ledger.store.peek("idem:a") == ledger.store.read("idem:a").stored
        assert [key for key, _ in ledger.store.scan("idem:")] == ["idem:a"]
    plain = open_store(redis_url)
    found = {key for part in ("staging:", "production:", "third_", "idem:") for key, _ in plain.scan(part)}
    assert found == {"staging:idem:a", "production:idem:a", "third_idem:a"}
    assert [ledger.store for ledger in Operator(apps["staging:"]).ledgers()] == [ledgers[0].store]


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a self-signed certificate for another host name."""
    folder = tmp_path_factory.mktemp("tls")
    port, certificate, options = tls(folder, "elsewhere")
    options += ("--tls-ca-cert-file", str(certificate))
    with running(lambda: RedisServer(folder / "server", options=options)):
        yield f"rediss://127.0.0.1:{port}"


@pytest.mark.redis
def test_a_server_whose_certificate_is_not_to_be_checked(encrypted: str) -> None:
    stores = [
        store_for(an_app(encrypted, redis_backend_use_ssl=NONE)),
        open_store(f"{encrypted}?ssl_cert_reqs=none"),
        open_store(f"{encrypted}?ssl_cert_reqs=CERT_NONE"),
    ]
    for number, store in enumerate(stores):
        assert store.create(str(number), MINE).done
        store.close()


@pytest.mark.redis
def test_a_password_from_the_settings_opens_the_store(start_redis: Callable[..., RedisServer]) -> None:
    server = start_redis()
    with client(server) as admin:
        admin.execute_command("ACL", "SETUSER", "shop", "on", ">s3cret", "~*", "+@all")
        admin.execute_command("ACL", "SETUSER", "default", "off")
    app = an_app(server.url, redis_username="shop", redis_password="s3cret")
    assert store_for(app).create("a", MINE).done
