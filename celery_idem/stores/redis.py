"""The store in Redis or Valkey. A record is one key: 8 bytes of stamp, then the packed record.

Each primitive is one round trip: a small script reads the server's clock and writes with ``SET … NX``, or compares
and writes. The index of what is open is a sorted set for each namespace, written by the same scripts. redis-py makes
the connections (TLS, authentication, Unix sockets). This module packs the commands itself, because packing is most of
what a call through redis-py costs.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import Stored
from celery_idem.stores.base import (
    KEEP,
    OWNER,
    Announcement,
    Change,
    Creation,
    Listed,
    Mark,
    NoIndexError,
    PartlyError,
    Reply,
    Store,
    call_after_fork,
)

SCHEMES = ("redis", "rediss", "redis+socket", "unix")

TIMEOUT = 5.0
"""Seconds to wait for a connection or an answer: redis-py's default. ``?socket_timeout=1`` in the URL changes it."""

SCAN_COUNT = 200
"""Keys per SCAN call: 0.3 to 0.4 ms of the server's time among a million records. 500 keys take 0.7 ms and shorten
the whole scan little (``docs/performance.md``)."""

SCAN_READ = 50
"""Maximum of values per MGET in a scan."""

SCAN_BYTES = 1 << 20
"""Bytes that an MGET in a scan should return, estimated from the one before: 0.2 to 0.6 ms of the server's time.
Fifty results of 1 MiB at once took 26 ms."""

DURABLE_WITHIN = 2.0
"""Seconds that a write may take to become durable: `appendfsync everysec` syncs once a second. With a shorter
socket timeout, half of that."""

HIDDEN = "…"
"""Stands for the part of a URL in which a password cannot be told from an address."""

INDEX = "~open"
"""What the namespace of an index has behind it: the sorted set's key."""

PAGE = 1000
"""Entries of the index per call: at about 80 bytes each, 80 kB."""

MARKS = 100
"""Corrections of the index per call: the server does nothing else for 0.2 ms."""

OPEN_FIRST = 32
"""Open records in the first MGET of a page: 2 MB at most, with calls of ``max_call_bytes``. Then as many as make
``SCAN_BYTES``."""

COMPLETE = b""
"""The index has this member, before all others, when it is complete: an empty sorted set does not exist, so without it
an index that nothing is in would look like one that was deleted."""

_STAMP = struct.Struct(">Q")

NO_STAMP = _STAMP.pack(1 << 53)
"""The first impossible stamp: the year 2255, and the limit of exact integers in Lua."""


class _Script:
    """A Lua script as a packed EVALSHA command without its arguments.

    Args:
        name: the file.
        words: number of keys and arguments.
        keys: number of keys.
        writes: the durability of the write can be waited for.

    Attributes:
        by_hash: the command. ``%`` inserts the words, each after its length, in one operation: half as long as
            packing them one by one.
        by_source: the same with the source, for a server that does not know the script yet.
    """

    def __init__(self, name: str, words: int, writes: bool = True, keys: int = 2) -> None:
        self.writes = writes
        self.keys = keys
        self.source = source = files("celery_idem.stores").joinpath(name).read_bytes()
        self.sha = sha = hashlib.sha1(source, usedforsecurity=False).hexdigest().encode()
        start, count = b"*%d\r\n" % (3 + words), b"%d" % keys
        missing = b"$%d\r\n%b\r\n" * words
        self.by_hash = start + _pack((b"EVALSHA", sha, count)) + missing
        self.by_source = start + _pack((b"EVAL", source, count)).replace(b"%", b"%%") + missing


def _pack(words: Sequence[bytes]) -> bytes:
    return b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


CREATE = _Script("create.lua", 5)
REPLACE = _Script("replace.lua", 6)
ANNOUNCE = _Script("replace.lua", 9, keys=3)
ANNOUNCE_NEW = _Script("create.lua", 8, keys=3)
READ = _Script("read.lua", 1, writes=False, keys=1)


@cache  # at most MARKS of them
def marking(number: int) -> _Script:
    """Return the script that corrects so many entries."""
    return _Script("mark.lua", 1 + 3 * number, writes=False, keys=1 + number)


GET = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n"


_ValuesOf = Callable[[Sequence[bytes]], Sequence[Any]]
"""Reads the values of names."""


class RefusedError(StoreError):
    """The server answered with an error, and wrote nothing."""


class RedisStore(Store):
    """Records in one Redis or Valkey server.

    Args:
        url: as redis-py's ``from_url`` takes it, and ``global_keyprefix`` as a further option.
        durability: "none", "replicas:N" or "fsync".
        given: arguments of redis-py's connection pool, in place of the URL.

    Attributes:
        prefix: prefix of every key, from Celery's ``global_keyprefix``.
    """

    expires = True
    durabilities = ("fsync", "replicas")
    announces = True

    def __init__(self, url: str, durability: str = "none", given: Mapping[str, Any] | None = None) -> None:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.url = self.readable(url)
        self._redis = redis
        self._errors = redis.exceptions
        try:
            options = dict(self._options(url) if given is None else given)
            self.prefix = key_prefix(options.pop("global_keyprefix", None))
            for name in ("socket_timeout", "socket_connect_timeout"):
                if options.get(name) is None:
                    options[name] = TIMEOUT
            flag = options.get("ssl_cert_reqs")
            if isinstance(flag, str):  # Celery's spelling is CERT_NONE, redis-py's none
                options["ssl_cert_reqs"] = flag.removeprefix("CERT_").lower()
            # redis-py tries once, so that the timeouts bound a call; _call decides what is tried again.
            options["retry"] = Retry(NoBackoff(), 0)
            options.pop("retry_on_timeout", None)
            self._pool = self._open_pool({**options, "protocol": 2, "decode_responses": False})
        except ValueError as error:
            raise ConfigurationError(f"idem_store: {self.url}: {error}") from None
        # Idle connections. pop and append are atomic. There are as many connections as calls run at once.
        self._idle: deque[Any] = deque()
        self._one_slot = False  # a node of a cluster, which refuses a script of two keys
        self._durability = durability
        answers_within = float(self._pool.connection_kwargs.get("socket_timeout") or TIMEOUT)
        self._waits = _waiting(durability, min(DURABLE_WITHIN, answers_within / 2))
        self._wait = b"".join(map(_command, self._waits))
        call_after_fork(self)

    @classmethod
    def readable(cls, url: str) -> str:
        """Return the URL without secrets.

        Raises:
            ConfigurationError: its password cannot be told from its address.
        """
        shown = cls._shown(url)
        if HIDDEN in shown:
            raise unreadable(shown)
        return shown

    @staticmethod
    def _shown(url: str) -> str:
        return redact(url)

    def _options(self, url: str) -> dict[str, Any]:
        """Return the URL's options as arguments of redis-py's connection pool."""
        options: dict[str, Any] = self._redis.connection.parse_url(url)
        return options

    def _open_pool(self, options: dict[str, Any]) -> Any:
        """Return a redis-py pool. Only its connection class and arguments are used."""
        return self._redis.ConnectionPool(**options)

    # --- primitives -----------------------------------------------------------------

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        reply = self._run(CREATE, key, self._creation(key, value, ttl, due))
        if type(reply) is int:
            return Reply(True, Stored(value, reply), reply)
        return self._again(_held(reply, key), key, value, ttl, due)

    def _creation(self, key: str, value: bytes, ttl: int | None, due: int | None) -> tuple[int | bytes, ...]:
        """Return the words of CREATE, each after its length."""
        name, index = (self.prefix + key).encode(), self._index(key)
        keep, look = _milliseconds(ttl), b"" if due is None else b"%d" % due
        return len(name), name, len(index), index, len(value), value, len(keep), keep, len(look), look

    def create_many(self, items: Sequence[Creation]) -> list[Reply | StoreError]:
        if not items:
            return []
        answers = self._all(CREATE, [self._creation(*item) for item in items])
        return [self._one_created(item, answer) for item, answer in zip(items, answers, strict=True)]

    def _one_created(self, item: Creation, answer: Any) -> Reply | StoreError:
        try:
            if isinstance(answer, Exception):  # NOSCRIPT after a restart, for one
                return self.create(*item)
            return self._again(_replaced(answer, item.key, item.value), *item)
        except StoreError as error:
            if not error.key:
                raise
            return error

    def read(self, key: str) -> Reply:
        name = (self.prefix + key).encode()
        return _held(self._run(READ, key, (len(name), name)), key, done=True)

    def peek(self, key: str) -> Stored | None:
        name = (self.prefix + key).encode()
        (reply,) = self._call(GET % (len(name), name), 1)
        if isinstance(reply, Exception):
            raise self._error(reply, key)
        return _held((0, reply), key).stored

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        reply = self._run(REPLACE, key, self._replacement(key, old, value, ttl, due))
        if type(reply) is int:
            return Reply(True, Stored(value, reply), reply)
        return self._again(_held(reply, key), key, value, ttl, due)

    def is_at(self, options: Mapping[str, Any]) -> bool:
        own = _address(self._pool.connection_kwargs)
        return own is not None and own == _address(options)

    def announce(self, change: Change | Creation, also: Announcement) -> tuple[Reply, bool]:
        if self._one_slot:
            return super().announce(change, also)
        if isinstance(change, Change):
            script, written = ANNOUNCE, self._replacement(*change)
        else:
            script, written = ANNOUNCE_NEW, self._creation(*change)
        second, value, keep = also.key, also.value, b"" if also.seconds is None else b"%d" % also.seconds
        # After the two keys that every write has.
        words = (*written[:4], len(second), second, *written[4:], len(value), value, len(keep), keep)
        try:
            reply = self._run(script, change.key, words)
        except RefusedError as error:  # a user who may not write there; the first value comes first
            self._one_slot = "same slot" in str(error)
            return super().announce(change, also)
        if type(reply) is int:
            return Reply(True, Stored(change.value, reply), reply), True
        return self._again(_held(reply, change.key), change.key, change.value, change.ttl, change.due), False

    def _replacement(
        self, key: str, old: Stored, value: bytes, ttl: int | None, due: int | None
    ) -> tuple[int | bytes, ...]:
        """Return the words of REPLACE, each after its length."""
        name, index = (self.prefix + key).encode(), self._index(key)
        expected = _STAMP.pack(old.stamp) + old.value[:OWNER]
        keep, look = _milliseconds(ttl), b"" if due is None else b"%d" % due
        words = len(name), name, len(index), index, len(expected), expected, len(value), value
        return (*words, len(keep), keep, len(look), look)

    def _index(self, key: str) -> bytes:
        """Return the key of the index that has a record's key, or the keys with a prefix."""
        return f"{self.prefix}{key.partition(':')[0]}{INDEX}".encode()

    def _again(self, reply: Reply, key: str, value: bytes, ttl: int | None, due: int | None) -> Reply:
        """Write once more if the key already holds this value.

        It is an earlier write of the same caller, which perhaps did not become durable in time.
        """
        if self._wait and not reply.done and reply.stored is not None and reply.stored.value == value:
            return self.replace(key, reply.stored, value, ttl, due)
        return reply

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        if not changes:
            return []
        replies = self._all(REPLACE, [self._replacement(*change) for change in changes])
        return whole([self._one_of_many(*one) for one in zip(changes, replies, strict=True)])

    def _all(self, script: _Script, every: Sequence[tuple[int | bytes, ...]]) -> list[Any]:
        """Run a script once for each of these words, in one round trip."""
        packed = b"".join([script.by_hash % words for words in every])
        replies = self._call(packed + self._wait, len(every) + bool(self._wait))
        if self._wait:
            waited = replies.pop()
            if any(type(reply) is int for reply in replies):
                self._check_durable(waited)
        return replies

    def _one_of_many(self, change: Change, reply: Any) -> Reply | StoreError:
        """Return the reply, or the error if it concerns this key alone."""
        try:
            if isinstance(reply, Exception):  # NOSCRIPT after a restart, for one
                return self.replace(*change)
            return _replaced(reply, change.key, change.value)
        except StoreError as error:
            if not error.key:
                raise
            return error

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        return self._scan(prefix, self.execute, self._values)

    def _scan(
        self, prefix: str, ask: Callable[..., Any], values_of: _ValuesOf
    ) -> Iterator[tuple[str, Stored]]:
        whole = self.prefix + prefix
        pattern = "".join("\\" + c if c in "*?[]^\\" else c for c in whole) + "*"

        def pages() -> Iterator[Sequence[bytes]]:
            cursor = b"0"
            while True:
                cursor, keys = ask(b"SCAN", cursor, b"MATCH", pattern.encode(), b"COUNT", SCAN_COUNT)
                yield keys
                if not int(cursor):
                    return

        for key, stored in _read_all(pages(), values_of):
            if stored is not None:
                yield key.decode("utf-8", "replace")[len(self.prefix) :], stored

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        index = self._index(prefix)
        low: bytes = b"-inf"
        high = b"+inf" if before is None else b"%d" % before
        seen: set[bytes] = set()  # those with the score ``low``, where this page begins
        while True:
            limit = PAGE + len(seen)
            try:
                found = self.execute(b"ZRANGEBYSCORE", index, low, high, b"WITHSCORES", b"LIMIT", 0, limit)
            except RefusedError as error:
                if "WRONGTYPE" in str(error):
                    self.execute(b"DEL", index)
                    found = []
                else:
                    raise
            if low == b"-inf" and found[:1] != [COMPLETE]:
                raise NoIndexError(f"The store {self.url} has no index of what is open, or lost it.")
            scores = dict(zip(found[::2], found[1::2], strict=True))
            page = {name: (index, at) for name, at in scores.items() if name not in seen}
            yield from self._listed(prefix, page)
            if len(found) < 2 * limit:
                return
            latest = found[-1]
            seen = {name for name, at in scores.items() if at == latest}
            low = latest

    def _listed(self, prefix: str, page: Mapping[bytes, tuple[bytes, bytes]]) -> Iterator[Listed]:
        """Read what entries of an index (names, and the index and score of each) point to."""
        wanted = []
        for name, (index, _) in page.items():
            if name.startswith((self.prefix + prefix).encode()):
                wanted.append(name)
            elif name != COMPLETE and index != self._index_of(name):  # no record's of this namespace
                with contextlib.suppress(RefusedError):  # a user who may only read
                    self._remove(index, name)
        for name, stored in _read_all([wanted], self._values, OPEN_FIRST, PAGE):
            yield Listed(name.decode("utf-8", "replace")[len(self.prefix) :], _time(page[name][1]), stored)

    def _index_of(self, name: bytes) -> bytes | None:
        """Return the index that a name in the server belongs in; None for a name that no record has."""
        try:
            key = name.decode()
        except UnicodeDecodeError:
            return None
        return self._index(key[len(self.prefix) :]) if key.startswith(self.prefix) else None

    def _remove(self, index: bytes, name: bytes) -> None:
        self.execute(b"ZREM", index, name)

    def mark(self, marks: Sequence[Mark]) -> None:
        by_namespace: dict[str, list[Mark]] = {}
        for mark in marks:
            by_namespace.setdefault(mark.key.partition(":")[0], []).append(mark)
        for some in by_namespace.values():
            index = self._index(some[0].key)
            for first in range(0, len(some), MARKS):
                page = some[first : first + MARKS]
                self._run(marking(len(page)), page[0].key, self._marks(index, page))

    def _marks(self, index: bytes, marks: Sequence[Mark]) -> tuple[int | bytes, ...]:
        """Return the words of ``marking``, each after its length."""
        keys: list[int | bytes] = [len(index), index]
        values: list[int | bytes] = []
        for key, stamp, due in marks:
            name = (self.prefix + key).encode()
            was, look = _STAMP.pack(stamp) if stamp else b"", b"" if due is None else b"%d" % due
            keys += (len(name), name)
            values += (len(was), was, len(look), look)
        return (*keys, *values)

    def indexed(self, prefix: str) -> None:
        self.execute(b"ZADD", self._index(prefix), b"-inf", COMPLETE)

    def _values(self, names: Sequence[bytes]) -> Sequence[Any]:
        values: Sequence[Any] = self.execute(b"MGET", *names)
        return values

    def purge(self, limit: int) -> int:
        return 0  # the server expires values itself

    def close(self) -> None:
        while self._idle:
            self._idle.pop().disconnect()

    def forked(self) -> None:
        self._idle = deque()

    def execute(self, *words: bytes | str | int) -> Any:
        """Run another command, such as INFO, for diagnosis."""
        return self._one(_command([w if isinstance(w, bytes) else str(w).encode() for w in words]))

    def everywhere(self, *words: bytes | str | int) -> dict[str, Any]:
        """As ``execute``, on every server that takes writes; its answer by its name."""
        return {self.url: self.execute(*words)}

    # --- the wire -------------------------------------------------------------------

    def _run(self, script: _Script, key: str, words: tuple[int | bytes, ...]) -> Any:
        wait = self._wait if script.writes else b""
        expected = 2 if wait else 1
        alone = self._one_slot and script.keys == 2
        if not alone:
            replies = self._call(script.by_hash % words + wait, expected)
            if isinstance(replies[0], self._errors.NoScriptError):
                replies = self._call(script.by_source % words + wait, expected)
            reply = replies[0]
            alone = isinstance(reply, Exception) and script.keys == 2 and "same slot" in str(reply)
        if alone:
            self._one_slot = True
            replies = self._run_one_key(script, words, wait, expected)
            reply = replies[0]
        if isinstance(reply, Exception):
            raise self._error(reply, key)
        if wait and type(reply) is int:  # it wrote
            self._check_durable(replies[1])
        return reply

    def _run_one_key(
        self, script: _Script, words: tuple[int | bytes, ...], wait: bytes, expected: int
    ) -> list[Any]:
        """Write the record alone: this server is a node of a cluster, and has no index."""
        name, _, *rest = words[1::2]
        for run, by in ((b"EVALSHA", script.sha), (b"EVAL", script.source)):
            replies = self._call(_command([run, by, b"1", name, *rest]) + wait, expected)  # type: ignore[list-item]
            if not isinstance(replies[0], self._errors.NoScriptError):
                break
        return replies

    def _error(self, reply: Exception, key: str) -> StoreError:
        if "WRONGTYPE" in str(reply):  # a list or hash of another program
            return _no_record(key)
        return self._refusal(reply)

    def _check_durable(self, waited: Any) -> None:
        """Raise StoreError if the answer to WAIT or WAITAOF says that the write may still be lost."""
        what = f"idem_durability={self._durability!r}"
        if isinstance(waited, Exception):
            raise StoreError(
                f"The store {self.url} cannot honour {what}: {waited}. It was written, but is not known to be durable. "
                '"fsync" needs Redis 7.2 or Valkey with appendonly on; "replicas:N" works everywhere.'
            )
        needed = int(self._durability.partition(":")[2] or 1)
        reached = waited[0] if isinstance(waited, list) else waited
        if reached < needed:
            whom = "not its disk" if isinstance(waited, list) else f"{reached} of {needed} replicas"
            raise StoreError(f"The store {self.url} has written, but reached {whom} in time for {what}.")

    def _one(self, packed: bytes) -> Any:
        (reply,) = self._call(packed, 1)
        if isinstance(reply, Exception):
            raise self._refusal(reply)
        return reply

    def _call(self, packed: bytes, replies: int) -> list[Any]:
        """Send commands and return that many replies. An error that the server answers is a reply.

        A dead connection is replaced once. Sending a write twice is safe, because an owner token that only the
        sender knows guards it.
        """
        errors = self._errors
        try:
            return self._exchange(packed, replies)
        except errors.TimeoutError as error:
            raise self._silence(error) from error
        except (errors.AuthenticationError, errors.ResponseError) as error:  # while a connection opens
            raise self._refusal(error) from error
        except (errors.ConnectionError, OSError):
            self.close()  # the other idle connections are dead too
        except errors.RedisError as error:
            raise StoreError(
                f"The store {self.url} does not answer as Redis does: {error}. Look at host and port in idem_store."
            ) from error
        try:
            return self._exchange(packed, replies)
        except (errors.RedisError, OSError) as error:
            raise self._silence(error) from error

    def _exchange(self, packed: bytes, replies: int) -> list[Any]:
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.connection_class(**self._pool.connection_kwargs)
            connection.connect()  # the first command would connect without asking a sentinel
        answers: list[Any] = []
        try:
            connection.send_packed_command((packed,), check_health=False)
            while len(answers) < replies:
                try:
                    answers.append(connection.read_response(disable_decoding=True))
                except self._errors.ResponseError as error:
                    answers.append(error)
        except BaseException:
            # A soft time limit may interrupt this at any point. The next user of the connection must not read
            # the reply that may still arrive.
            connection.disconnect()
            raise
        self._idle.append(connection)
        return answers

    def _silence(self, error: Exception) -> StoreError:
        return StoreError(f"The store {self.url} did not answer: {str(error).rstrip('.')}.")

    def _refusal(self, error: Exception) -> StoreError:
        if isinstance(error, self._errors.ReadOnlyError):
            self.close()  # the server was demoted to a replica: the next call connects again
        text = str(error).rstrip(".")
        if "permission" in text.lower() or "executing the script can't" in text:
            text += ". The user in idem_store needs more rights: the page on security has the ACL rule"
        if "DB index" in text:
            text += (
                ". Choose another database in idem_store, or raise `databases` in the server's configuration"
            )
        return RefusedError(f"The store {self.url} refused: {text}.")


def open_url(url: str, durability: str = "none") -> RedisStore:
    """Return the store for kombu's and redis-py's forms of a Redis URL."""
    if url.startswith("redis+socket://"):  # kombu's spelling of redis-py's unix://
        path, _, query = url.removeprefix("redis+socket://").partition("?")
        url = f"unix://{path}?{query.replace('virtual_host=', 'db=')}"
    return RedisStore(url, durability)


def open_server(options: Mapping[str, Any], durability: str = "none") -> RedisStore:
    """Return the store for arguments of redis-py's connection pool."""
    if "path" in options:
        shown = f"unix://{options['path']}"
    else:
        kind = options.get("connection_class")
        scheme = "rediss" if isinstance(kind, type) and "SSL" in kind.__name__ else "redis"
        shown = f"{scheme}://{options.get('host')}:{options.get('port')}/{options.get('db', 0)}"
    return RedisStore(shown, durability, options)


def _address(options: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Database and user that arguments of redis-py's connection pool lead to. None behind sentinels, which name the
    server when it is asked for."""
    if not options.get("host") and not options.get("path"):
        return None
    place = options.get("path") or (options["host"], options.get("port", 6379))
    return place, options.get("db", 0), options.get("username")


def key_prefix(given: str | None) -> str:
    """Return ``global_keyprefix`` in the form that Celery's result backend puts before its keys."""
    return f"{given}_" if given and given[-1] not in ":_-." else given or ""


def redact(url: str) -> str:
    """Return the URL without user, password and query, for logs."""
    parts = urlsplit(url)
    if "@" in f"{parts.path}{parts.query}{parts.fragment}":
        # The password has an unescaped "/", "?" or "#", so the host part is a piece of it.
        return f"{parts.scheme}://{HIDDEN}"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def unreadable(shown: str) -> ConfigurationError:
    """Return the error for a URL whose password cannot be told from its address."""
    return ConfigurationError(
        f"idem_store: {shown} cannot be read, because its user or password has a character that means something "
        "else in a URL. Percent-encode it: %2F for /, %23 for #, %3F for ?, %3B for ;, %40 for @."
    )


def _waiting(durability: str, seconds: float) -> list[tuple[bytes, ...]]:
    """Return the command that follows each write: one, or none without durability."""
    limit = b"%d" % int(seconds * 1000)
    if durability == "fsync":
        return [(b"WAITAOF", b"1", b"0", limit)]
    if durability.startswith("replicas:"):
        return [(b"WAIT", durability.partition(":")[2].encode(), limit)]
    return []


def _command(words: Sequence[bytes]) -> bytes:
    return b"*%d\r\n" % len(words) + _pack(words)


def whole(answers: Sequence[Reply | StoreError]) -> list[Reply]:
    """Return the answers, if none of them is an error. Raises ``PartlyError``: an answer is an error."""
    replies = [answer if isinstance(answer, Reply) else None for answer in answers]
    for answer in answers:
        if isinstance(answer, StoreError):
            raise PartlyError(answer, replies) from answer
    return [reply for reply in replies if reply is not None]


def _read_all(
    pages: Iterable[Sequence[bytes]], values_of: _ValuesOf, at_once: int = 1, most: int = SCAN_READ
) -> Iterator[tuple[bytes, Stored | None]]:
    """Read what names have, in bounded memory: None for nothing, and for what is no record.

    Args:
        at_once: in the first call, as the size of the values is not known yet.
        most: in any call.
    """
    for names in pages:
        while names:
            some, names = names[:at_once], names[at_once:]
            values = values_of(some)
            size = sum(len(value) for value in values if value is not None)
            at_once = max(1, min(most, 2 * at_once, SCAN_BYTES * len(some) // (size + 1)))
            for name, value in zip(some, values, strict=True):
                is_record = value is not None and len(value) > _STAMP.size and value[: _STAMP.size] < NO_STAMP
                yield name, _stored(value) if is_record else None


def _time(score: bytes) -> int:
    """Return a score as a time; 0 for one that is none."""
    number = float(score)
    return int(number) if math.isfinite(number) else 0


def _replaced(reply: Any, key: str, value: bytes) -> Reply:
    if type(reply) is int:
        return Reply(True, Stored(value, reply), reply)
    return _held(reply, key)


def _no_record(key: str) -> StoreError:
    return StoreError(
        f"The store holds something at {key} that is not a record of celery_idem. Nothing was run. Look at the "
        "value; if it is not needed, delete it there.",
        key,
    )


def _held(reply: Any, key: str, done: bool = False) -> Reply:
    now, value = reply
    if value is None:
        return Reply(False, None, now)
    if len(value) <= _STAMP.size or value[: _STAMP.size] >= NO_STAMP:
        raise _no_record(key)
    return Reply(done, _stored(value), now)


def _stored(value: bytes) -> Stored:
    return Stored(value[_STAMP.size :], _STAMP.unpack_from(value)[0])


def _milliseconds(ttl: int | None) -> bytes:
    """Return a TTL for the scripts, rounded up: empty means for ever, 0 not at all, -1 what is left."""
    return b"" if ttl is None else b"-1" if ttl == KEEP else b"%d" % -(-ttl // 1000)
