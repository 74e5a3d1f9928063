"""The store in Redis or Valkey Cluster. Each record is on the node that owns its key's slot.

redis-py's cluster client knows the nodes, follows slots that move, and looks the owners up again when a node fails.
This module adds four things: waiting for durability on the connection that wrote, many replacements in one round
trip per node, a complete scan while slots move, and an index of what is open for each slot: a script writes keys of one
slot only, and the entry has to move with its record.
"""

from __future__ import annotations

import contextlib
import threading
from binascii import crc_hqx
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import urlsplit

from celery_idem.core.errors import ConfigurationError, StoreError
from celery_idem.core.model import Stored
from celery_idem.stores.base import Change, Listed, Mark, NoIndexError, Reply, Store
from celery_idem.stores.redis import PAGE, REPLACE, RedisStore, _held, _Script, marking, whole

SCHEMES = ("redis-cluster", "rediss-cluster")

T = TypeVar("T")
Address = tuple[str, int]

TRIES = 3
"""Attempts of a durable write to find the owner of its slot: a slot that is moving takes two."""

SLOTS = 1 << 14
"""Hash slots of a cluster."""

TAGS = 1000
"""Slots whose indexes one call reads: 1 ms of the node's time."""

COMPLETE_KEY = b":complete"
"""Behind an index's key: the key that says that it is complete."""

SLOTS_LUA = files("celery_idem.stores").joinpath("slots.lua").read_bytes()

HOPS = 4
"""Attempts of one command to find the owner of its slot: one that has moved takes two. While a slot moves, its nodes
refuse a script with two keys, and redis-py waits 0.05 s before the last two attempts."""

PORT = 6379
"""Redis' default port."""

_left_behind: list[Any] = []
"""A forked child's copies of its parent's clients. Kept, because garbage collection would close them, under a lock
that a thread of the parent may have held at the fork."""


class ClusterStore(RedisStore):
    """Records in a cluster.

    Args:
        url: ``redis-cluster://user:password@host:port,host:port/?option=…``; with TLS
            ``rediss-cluster://``. One host that answers is enough.
        durability: as for one server.
    """

    announces = False  # the two keys are on different nodes

    def __init__(self, url: str, durability: str = "none") -> None:
        self._cluster: Any = None
        self._making = threading.Lock()
        self._silent: set[str] = set()  # nodes that did not answer the last time
        self._known: list[Address] = []  # asked first: the nodes in the URL may not exist any more
        super().__init__(url, durability)
        self._slot_of = self._redis.crc.key_slot

    def _options(self, url: str) -> dict[str, Any]:
        parts = urlsplit(url)
        user, _, hosts = parts.netloc.rpartition("@")
        try:
            self._seeds = [_address(host) for host in hosts.split(",")]
        except ValueError:
            raise ConfigurationError(
                f"idem_store: {self.url}: write redis-cluster://host:port,host:port"
            ) from None
        if parts.path.strip("/") not in ("", "0"):
            raise ConfigurationError(f"idem_store: {self.url}: a cluster has only one database, 0.")
        scheme = parts.scheme.removesuffix("-cluster")
        options = super()._options(f"{scheme}://{user}{'@' if user else ''}node/?{parts.query}")
        if scheme == "rediss":
            options["ssl"] = True
        return {name: value for name, value in options.items() if name not in ("connection_class", "host")}

    def _open_pool(self, options: dict[str, Any]) -> Any:
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._how = {**options, "retry": Retry(NoBackoff(), 1)}  # once more, after looking up the owners
        return super()._open_pool({name: value for name, value in options.items() if name != "ssl"})

    # --- primitives -------------------------------------------------------------------

    def peek(self, key: str) -> Stored | None:
        try:
            reply = self._ask("GET", self.prefix + key)
        except self._errors.ResponseError as error:
            raise self._error(error, key) from error
        return _held((0, reply), key).stored

    create_many = Store.create_many

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        """Use one round trip per node. A node that did not answer the last time comes last."""
        answers: dict[int, Reply | StoreError] = {}
        by_node: dict[str, tuple[Any, list[int]]] = {}
        self._client()
        for n, change in enumerate(changes):
            try:
                node = self._owner(self.prefix + change.key)
            except StoreError as error:  # no node has its slot
                answers[n] = error
            else:
                by_node.setdefault(node.name, (node, []))[1].append(n)
        for name in sorted(by_node, key=lambda name: name in self._silent):
            node, numbers = by_node[name]
            try:
                answers.update(zip(numbers, self._many_at(node, [changes[n] for n in numbers]), strict=True))
                self._silent.discard(name)
            except StoreError as error:
                self._silent.add(name)
                answers.update(dict.fromkeys(numbers, error))
        return whole([answers[n] for n in range(len(changes))])

    def _many_at(self, node: Any, changes: Sequence[Change]) -> list[Reply | StoreError]:
        commands = [
            ("EVALSHA", REPLACE.sha, REPLACE.keys, *self._replacement(*change)[1::2]) for change in changes
        ]
        answers = self._at(node, [*commands, *self._waits])
        if self._waits and any(type(answer) is int for answer in answers[:-1]):
            self._check_durable(answers[-1])
        # After an error (unknown script, moved slot) _one_of_many tries that replacement alone.
        return [self._one_of_many(*one) for one in zip(changes, answers, strict=False)]

    def mark(self, marks: Sequence[Mark]) -> None:
        """Use one round trip per node. What a node refuses, because a slot moves, is tried alone."""
        by_node: dict[str, tuple[Any, list[Mark]]] = {}
        self._client()
        for mark in marks:
            node = self._owner(self.prefix + mark.key)
            by_node.setdefault(node.name, (node, []))[1].append(mark)
        script = marking(1)
        for node, some in by_node.values():
            words = [self._marks(self._index(mark.key), [mark])[1::2] for mark in some]
            answers = self._at(node, [("EVALSHA", script.sha, script.keys, *each) for each in words])
            for mark, answer in zip(some, answers, strict=False):
                if isinstance(answer, Exception):
                    super().mark([mark])

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        """Scan every master. If slots moved meanwhile, scan all of them again.

        A key may have moved from a master that was not scanned yet to one that was.
        """
        before = self._layout()
        yield from self._scan_all(prefix)
        after = self._layout()
        if before != after or any(moving for _, moving in after.values()):
            yield from self._scan_all(prefix)

    def _scan_all(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        for node in self._client().get_primaries():
            yield from self._scan(prefix, partial(self._one_at, node), partial(self._values_at, node))

    # --- the index of what is open ----------------------------------------------------

    def _index(self, key: str) -> bytes:
        """Return the key of the index in the slot of a record's key.

        With a hash tag in the namespace all its records have one slot, and one index.
        """
        whole = super()._index(key)
        return (
            whole if b"{" in whole else _tagged(whole, _tags()[self._slot_of((self.prefix + key).encode())])
        )

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        """Read the indexes of all slots, and put their entries in order: all names, and then the records in pages."""
        whole = super()._index(prefix)
        if not self._ask("EXISTS", whole + COMPLETE_KEY):
            raise NoIndexError(f"The store {self.url} has no index of what is open, or lost it.")
        high = b"+inf" if before is None else b"%d" % before
        entries = {}
        for index, found in self._entries(whole, high):
            for name, at in zip(found[::2], found[1::2], strict=True):
                entries[name] = index, at
        names = sorted(entries, key=lambda name: (float(entries[name][1]), name))
        for first in range(0, len(names), PAGE):
            page = {name: entries[name] for name in names[first : first + PAGE]}
            yield from self._listed(prefix, page)

    def _entries(self, whole: bytes, high: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
        """Return each index that has entries, and names and scores in turn."""
        if b"{" in whole:
            yield whole, self._ask("ZRANGEBYSCORE", whole, "-inf", high, "WITHSCORES")
            return
        by_node: dict[str, tuple[Any, list[bytes]]] = {}
        for slot, nodes in self._client().nodes_manager.slots_cache.items():
            by_node.setdefault(nodes[0].name, (nodes[0], []))[1].append(_tags()[slot])
        for node, tags in by_node.values():
            for first in range(0, len(tags), TAGS):
                some = tags[first : first + TAGS]
                for tag, *found in self._one_at(node, "EVAL", SLOTS_LUA, 0, whole, high, *some):
                    index = _tagged(whole, tag)
                    if found:
                        yield index, found[0]
                    else:  # the slot is not there any more
                        yield index, self._ask("ZRANGEBYSCORE", index, "-inf", high, "WITHSCORES")

    def _remove(self, index: bytes, name: bytes) -> None:
        self._ask("ZREM", index, name)

    def indexed(self, prefix: str) -> None:
        """One key of the namespace, on any node, says that the slots' indexes are complete."""
        self._ask("SET", super()._index(prefix) + COMPLETE_KEY, 1)

    def _values(self, names: Sequence[bytes]) -> Sequence[Any]:
        by_node: dict[str, tuple[Any, list[bytes]]] = {}
        for name in names:
            node = self._owner(name.decode())
            by_node.setdefault(node.name, (node, []))[1].append(name)
        values: dict[bytes, Any] = {}
        for node, some in by_node.values():
            values.update(zip(some, self._values_at(node, some), strict=True))
        return [values[name] for name in names]

    def execute(self, *words: bytes | str | int) -> Any:
        """Run another command on one of the nodes."""
        return self._one_at(self._client().get_primaries()[0], *words)

    def everywhere(self, *words: bytes | str | int) -> dict[str, Any]:
        return {node.name: self._one_at(node, *words) for node in self._client().get_primaries()}

    def close(self) -> None:
        client = self._forget()
        if client is not None:
            client.close()

    def forked(self) -> None:
        super().forked()
        _left_behind.append(self._cluster)
        self._cluster, self._making = None, threading.Lock()

    # --- redis-py's client ------------------------------------------------------------

    def _client(self) -> Any:
        client = self._cluster
        if client is None:
            with self._making:
                client = self._cluster
                if client is None:
                    client = self._cluster = self._safely(self._connected)
        return client

    def _connected(self) -> Any:
        """Return a client that has looked up the owners of the slots."""
        from redis.cluster import ClusterNode, RedisCluster

        nodes = [ClusterNode(*address) for address in dict.fromkeys([*self._known, *self._seeds])]
        nodes.sort(key=lambda node: node.name in self._silent)
        # A slot without an owner is an error for its own keys only.
        client = RedisCluster(startup_nodes=nodes, require_full_coverage=False, **self._how)
        client.RedisClusterRequestTTL = HOPS
        self._known = [(node.host, node.port) for node in client.get_primaries()]
        return client

    def _forget(self) -> Any:
        """Make the next call look the owners up again; return the old client."""
        client, self._cluster = self._cluster, None
        return client

    def _safely(self, call: Callable[[], T]) -> T:
        """Turn the client's errors into ``StoreError``. Errors that a node answered pass."""
        from redis.exceptions import RedisClusterException

        errors = self._errors
        try:
            return call()
        except (errors.MovedError, errors.AskError, errors.ClusterDownError) as error:
            self._forget()
            raise self._silence(error) from error
        except errors.ResponseError:
            raise
        except errors.ClusterError as error:  # after ``HOPS`` attempts
            raise errors.TryAgainError(str(error)) from error
        except (errors.RedisError, RedisClusterException, OSError) as error:
            self._forget()
            raise self._silence(error) from error
        except (LookupError, AttributeError) as error:  # in the client: it does not know the node (yet)
            self._forget()
            raise StoreError(
                f"The store {self.url} did not answer: its nodes and slots are changing, or none of the hosts belongs "
                "to the cluster any more. Try again; then name other hosts in idem_store."
            ) from error

    def _ask(self, *words: Any) -> Any:
        return self._safely(lambda: self._client().execute_command(*words))

    def _at(self, node: Any, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send commands to one node in one round trip. An error that it answers is a reply."""

        def call() -> list[Any]:
            with self._client().get_redis_connection(node).pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                answers: list[Any] = pipe.execute(raise_on_error=False)
                return answers

        return self._safely(call)

    def _owner(self, name: str) -> Any:
        return self._safely(lambda: self._client().get_node_from_key(name))

    def _run(self, script: _Script, key: str, words: tuple[int | bytes, ...]) -> Any:
        try:
            return self._eval(script, script.keys, *words[1::2])
        except (self._errors.TryAgainError, self._errors.ClusterCrossSlotError) as error:
            if not script.writes:
                raise StoreError(f"A slot of {self.url} is moving. Try again.", key) from error
        except self._errors.ResponseError as error:
            raise self._error(error, key) from error
        return self._run_apart(script, key, *words[1::2])

    def _run_apart(self, script: _Script, key: str, name: Any, index: Any, *rest: Any) -> Any:
        """Write the record, and then its entry in the index: while a slot moves, each may be on either of two nodes."""
        try:
            reply = self._eval(script, 1, name, *rest)
            if type(reply) is int:  # it wrote
                with contextlib.suppress(StoreError, self._errors.ResponseError):  # a hint
                    if rest[-1]:
                        self._ask("ZADD", index, reply + int(rest[-1]), name)
                    else:
                        self._ask("ZREM", index, name)
        except self._errors.ResponseError as error:
            raise self._error(error, key) from error
        return reply

    def _eval(self, script: _Script, keys: int, *words: Any) -> Any:
        run = self._write_durably if self._waits and script.writes else self._ask
        try:
            return run("EVALSHA", script.sha, keys, *words)
        except self._errors.NoScriptError:
            return run("EVAL", script.source, keys, *words)

    def _write_durably(self, *words: Any) -> Any:
        """Send a write and its WAIT on one connection: WAIT counts only what its own connection wrote."""
        name = words[3].decode()
        node, asking = self._owner(name), False
        for _ in range(TRIES):
            before = [("ASKING",)] if asking else []
            answers = self._at(node, [*before, words, *self._waits])
            reply, waited = answers[-2:]
            if isinstance(reply, self._errors.AskError):  # MovedError is one too
                asking = not isinstance(reply, self._errors.MovedError)
                host, port = reply.node_addr
                if not asking:
                    self._ask("EXISTS", name)  # redis-py follows the redirection and remembers it
                node = self._safely(partial(self._known_node, host, port))
                continue
            if isinstance(reply, Exception):
                raise reply
            if type(reply) is int:  # it wrote
                self._check_durable(waited)
            return reply
        self._forget()
        raise StoreError(
            f"The nodes of {self.url} send {name} back and forth. Nothing was written. Try again.", name
        )

    def _known_node(self, host: str, port: int) -> Any:
        node = self._client().get_node(host=host, port=port)
        if node is None:
            raise LookupError(host)
        return node

    # --- reading all ------------------------------------------------------------------

    def _one_at(self, node: Any, *words: Any) -> Any:
        (answer,) = self._at(node, [words])
        if isinstance(answer, Exception):
            raise self._refusal(answer) from answer
        return answer

    def _values_at(self, node: Any, keys: Sequence[bytes]) -> Sequence[Any]:
        """Read one by one: MGET does not take keys of several slots."""
        return [
            self._moved_value(key) if isinstance(value, self._errors.AskError) else _text(value)
            for key, value in zip(keys, self._at(node, [("GET", key) for key in keys]), strict=True)
        ]

    def _moved_value(self, key: bytes) -> Any:
        try:
            return self._ask("GET", key)
        except self._errors.ResponseError:  # a list or hash of another program
            return None

    def _layout(self) -> dict[str, tuple[Any, Any]]:
        """Return each master's slots and the moves that it takes part in, as the masters report them."""
        self._forget()
        layout = {}
        for node in self._client().get_primaries():
            nodes = self._one_at(node, "CLUSTER NODES")
            mine = next(one for one in nodes.values() if "myself" in one["flags"])
            layout[node.name] = mine["slots"], mine["migrations"]
        return layout


@lru_cache(maxsize=1)
def _tags() -> list[bytes]:
    """Return a hash tag for each slot: the first number that is in it. Takes 60 ms."""
    tags: dict[int, bytes] = {}
    n = 0
    while len(tags) < SLOTS:
        tag = b"%x" % n
        tags.setdefault(crc_hqx(tag, 0) % SLOTS, tag)
        n += 1
    return [tags[slot] for slot in range(SLOTS)]


def _tagged(whole: bytes, tag: bytes) -> bytes:
    return b"%b:{%b}" % (whole, tag)


def _text(value: Any) -> Any:
    """Return a value, or None for an error: the key holds a list or a hash."""
    return None if isinstance(value, Exception) else value


def _address(host: str) -> Address:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError(host)
    return parts.hostname, parts.port or PORT


def open_url(url: str, durability: str = "none") -> ClusterStore:
    """Return the store for a cluster's URL."""
    return ClusterStore(url, durability)
