"""Redis or Valkey Cluster: each record on the node that owns its key's slot.

A record is one key, so each primitive is one command to one node. A node that does not
own the slot (any more) says who does; that costs one more round trip, once. While a slot
is being moved, the old owner may send single keys on to the new one ("ASK").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from celery_idem.errors import ConfigurationError, StoreError
from celery_idem.intent import Stored
from celery_idem.stores.base import Change, Reply, Store
from celery_idem.stores.redis import HIDDEN, RedisStore, _command, redact, unreadable

T = TypeVar("T")
Address = tuple[str, int]

SLOTS = 16_384
"""Slots in a cluster: fixed by its protocol."""

REDIRECTS = 5
"""Redirections one call follows: one is usual, two happen while a slot changes hands, and
more than that is a cluster whose nodes disagree."""

SCANS = 3
"""Times a scan starts over because slots moved meanwhile."""

PORT = 6379
"""The port of a node that names none: Redis' own default."""


class Redirected(StoreError):
    """Another node has the key.

    Attributes:
        address: of that node; no host: the same as of the node that said so.
        asking: for this once; else from now on.
    """

    def __init__(
        self, message: str = "", key: str | None = None, address: Address = ("", 0), asking: bool = False
    ):
        super().__init__(message, key)
        self.address = address
        self.asking = asking


class ClusterNode(RedisStore):
    """One node of a cluster."""

    def _refusal(self, error: Exception) -> StoreError:
        errors = self._errors
        if isinstance(error, errors.AskError):  # MovedError is one too
            moved = isinstance(error, errors.MovedError)
            return Redirected(f"{self.url} redirects: {error}", None, error.node_addr, not moved)
        return super()._refusal(error)

    def _values(self, keys: Sequence[bytes]) -> Sequence[Any]:
        """One by one in one round trip: they lie in several slots, which MGET does not take. A
        key that is just being moved is found on its new node."""
        values = self._call(b"".join([_command((b"GET", key)) for key in keys]), len(keys))
        return [None if isinstance(value, Exception) else value for value in values]


class AskedNode(ClusterNode):
    """A node that is taking over a slot, for keys that the slot's owner sent on to it."""

    def _call(self, packed: bytes, replies: int) -> list[Any]:
        return super()._call(_command((b"ASKING",)) + packed, replies + 1)[1:]


class ClusterStore(Store):
    """Records in a cluster.

    Args:
        url: ``redis-cluster://user:password@host:port,host:port/?option=…``; with TLS
            ``rediss-cluster://``. One host that answers is enough to find the others.
        durability: as for one server.
    """

    expires = True
    durabilities = RedisStore.durabilities

    def __init__(self, url: str, durability: str = "none") -> None:
        parts = urlsplit(url)
        self.url = redact(url)
        if HIDDEN in self.url:
            raise unreadable(self.url)
        user, _, hosts = parts.netloc.rpartition("@")
        self._scheme = parts.scheme.removesuffix("-cluster")
        self._user = f"{user}@" if user else ""
        self._query = f"?{parts.query}" if parts.query else ""
        self._durability = durability
        try:
            self._seeds = [_address(host) for host in hosts.split(",")]
        except ValueError:
            raise ConfigurationError(
                f"idem_store: {self.url}: write redis-cluster://host:port,host:port"
            ) from None
        if parts.path.strip("/") not in ("", "0"):
            raise ConfigurationError(f"idem_store: {self.url}: a cluster has only one database, 0.")
        self._nodes: dict[tuple[Address, bool], ClusterNode] = {}
        self._owners: list[Address] = []  # by slot; empty: not known
        self._node(self._seeds[0], False)  # a wrong option is told at once

    # --- primitives -------------------------------------------------------------------

    def create(self, key: str, value: bytes, ttl: int | None = None) -> Reply:
        return self._at(key, lambda node: node.create(key, value, ttl))

    def read(self, key: str) -> Reply:
        return self._at(key, lambda node: node.read(key))

    def peek(self, key: str) -> Stored | None:
        return self._at(key, lambda node: node.peek(key))

    def replace(self, key: str, old: Stored, value: bytes, ttl: int | None = None) -> Reply:
        return self._at(key, lambda node: node.replace(key, old, value, ttl))

    def replace_many(self, changes: Sequence[Change]) -> list[Reply]:
        """One round trip for each node that has any of them."""
        by_node: dict[Address, list[int]] = {}
        for n, change in enumerate(changes):
            by_node.setdefault(self._owner(_slot(change.key)), []).append(n)
        replies: dict[int, Reply] = {}
        for address, numbers in by_node.items():
            some = [changes[n] for n in numbers]
            try:
                done = self._node(address, False).replace_many(some)
            except Redirected:
                # Those before it may be written; writing them again meets the caller's own value.
                done = [self.replace(*change) for change in some]
            except StoreError:
                self._owners = []
                raise
            replies.update(zip(numbers, done, strict=True))
        return [replies[n] for n in range(len(changes))]

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        """Node by node; again, when slots moved meanwhile: a key may have moved from a node that
        was still to come to one that was done."""
        for _ in range(SCANS):
            before = self._layout()
            for address in before:
                yield from self._node(address, False).scan(prefix)
            if before == self._layout() and not any(
                "->-" in text or "-<-" in text for text in before.values()
            ):
                return
        raise StoreError(
            f"The slots of {self.url} are being moved, so keys may be missing from this list. Try again afterwards."
        )

    def purge(self, limit: int) -> int:
        return 0  # the servers expire by themselves

    def close(self) -> None:
        for node in list(self._nodes.values()):
            node.close()
        self._owners = []

    # --- which node -------------------------------------------------------------------

    def _at(self, key: str, call: Callable[[ClusterNode], T]) -> T:
        slot = _slot(key)
        address, asking = self._owner(slot), False
        for _ in range(REDIRECTS):
            try:
                return call(self._node(address, asking))
            except Redirected as to:
                address, asking = (to.address[0] or address[0], to.address[1]), to.asking
                if not asking and self._owners:
                    self._owners[slot] = address
            except StoreError:
                self._owners = []  # the next call asks who owns what now
                raise
        self._owners = []
        raise StoreError(
            f"The nodes of {self.url} send {key} back and forth. Nothing was written. Try again.", key
        )

    def _node(self, address: Address, asking: bool) -> ClusterNode:
        node = self._nodes.get((address, asking))
        if node is None:
            host, port = address
            shown = f"[{host}]" if ":" in host else host
            url = f"{self._scheme}://{self._user}{shown}:{port}/0{self._query}"
            made = (AskedNode if asking else ClusterNode)(url, self._durability)
            node = self._nodes.setdefault((address, asking), made)
        return node

    def _owner(self, slot: int) -> Address:
        owner = (self._owners or self._learnt())[slot]
        if not owner[1]:
            self._owners = []
            raise StoreError(f"No node of {self.url} has slot {slot} now. Nothing was written.")
        return owner

    def _learnt(self) -> list[Address]:
        """Who owns which slot, from the first node that answers."""
        last: StoreError | None = None
        for address in dict.fromkeys([address for address, _ in self._nodes] + self._seeds):
            try:
                ranges = self._node(address, False).execute("CLUSTER", "SLOTS")
            except StoreError as error:
                last = error
                continue
            owners: list[Address] = [("", 0)] * SLOTS
            for first, final, master, *_ in ranges:
                host = master[0].decode() if master[0] else address[0]
                owners[first : final + 1] = [(host, int(master[1]))] * (final + 1 - first)
            self._owners = owners
            return owners
        raise StoreError(f"No node of {self.url} answers: {last}")

    def _layout(self) -> dict[Address, str]:
        """Each master, with the slots it has, gives away and takes in, in its own words."""
        layout = {}
        for address in sorted(set(self._learnt()) - {("", 0)}):
            text = self._node(address, False).execute("CLUSTER", "NODES").decode()
            mine = next(line for line in text.splitlines() if "myself" in line)
            layout[address] = " ".join(mine.split()[8:])
        return layout


def _slot(key: str) -> int:
    from redis.crc import key_slot

    return int(key_slot(key.encode()))


def _address(host: str) -> Address:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError(host)
    return parts.hostname, parts.port or PORT


def open_cluster(url: str, durability: str = "none") -> ClusterStore:
    """The store for a cluster's URL."""
    return ClusterStore(url, durability)
