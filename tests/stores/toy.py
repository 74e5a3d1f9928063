import fcntl
import hashlib
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from celery_idem.core.errors import StoreError
from celery_idem.core.model import Stored
from celery_idem.stores.base import KEEP, OWNER, Listed, Mark, Reply, Store

HEAD = struct.Struct(
    ">QQQI"
)  # stamp, expiry and time to look (0: never), length of the key; then key and value


class DirectoryStore(Store):
    """A file for each value, and one lock for all. The clock is the file system's."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.url = f"directory://{self.folder}"

    def create(self, key: str, value: bytes, ttl: int | None = None, due: int | None = None) -> Reply:
        with self._locked() as now:
            held = self._held(key, now)
            return Reply(False, held, now) if held else self._write(key, value, now, now, ttl, due)

    def read(self, key: str) -> Reply:
        with self._locked() as now:
            held = self._held(key, now)
            return Reply(held is not None, held, now)

    def replace(
        self, key: str, old: Stored, value: bytes, ttl: int | None = None, due: int | None = None
    ) -> Reply:
        with self._locked() as now:
            held = self._held(key, now)
            if held is None or (held.stamp, held.value[:OWNER]) != (old.stamp, old.value[:OWNER]):
                return Reply(False, held, now)
            return self._write(key, value, max(now, old.stamp + 1), now, ttl, due)

    def scan(self, prefix: str) -> Iterator[tuple[str, Stored]]:
        for key in self._keys():
            stored = self.read(key).stored if key.startswith(prefix) else None
            if stored is not None:
                yield key, stored

    def open(self, prefix: str, before: int | None = None) -> Iterator[Listed]:
        found = []  # a real store has an index, and reads page by page
        for key in self._keys():
            with self._locked() as now:
                held = self._held(key, now) if key.startswith(prefix) else None
                at = HEAD.unpack_from(self._path(key).read_bytes())[2] if held else 0
            if at and (before is None or at <= before):
                found.append(Listed(key, at, held))
        yield from sorted(found, key=lambda listed: listed.at)

    def mark(self, marks: Sequence[Mark]) -> None:
        for key, stamp, due in marks:
            with self._locked() as now:
                held = self._held(key, now)
                if held is not None and held.stamp == stamp:
                    self._write(key, held.value, stamp, now, KEEP, due)

    def purge(self, limit: int) -> int:
        deleted = 0
        for key in self._keys():
            with self._locked() as now:
                if deleted < limit and self._path(key).exists() and self._held(key, now) is None:
                    self._path(key).unlink()
                    deleted += 1
        return deleted

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the lock, after at most five seconds of waiting, and give the time."""
        deadline = time.monotonic() + 5
        with (self.folder / "lock").open("w") as lock:  # a lock of our own: threads must not share one
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise StoreError(f"The store {self.url} is locked.") from None
                    time.sleep(0.001)
            os.utime(lock.fileno())
            yield os.fstat(lock.fileno()).st_mtime_ns // 1000

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.record"

    def _keys(self) -> list[str]:
        heads = [path.read_bytes() for path in self.folder.glob("*.record")]
        return [head[HEAD.size :][: HEAD.unpack_from(head)[3]].decode() for head in heads]

    def _held(self, key: str, now: int) -> Stored | None:
        if not self._path(key).exists():
            return None
        packed = self._path(key).read_bytes()
        stamp, expires, _, length = HEAD.unpack_from(packed)
        return None if expires and expires <= now else Stored(packed[HEAD.size + length :], stamp)

    def _write(self, key: str, value: bytes, stamp: int, now: int, ttl: int | None, due: int | None) -> Reply:
        name, expires, look = key.encode(), 0 if ttl is None else now + ttl, 0 if due is None else stamp + due
        if ttl == KEEP:
            expires = HEAD.unpack_from(self._path(key).read_bytes())[1]
        new = self._path(key).with_suffix(".new")
        new.write_bytes(HEAD.pack(stamp, expires, look, len(name)) + name + value)
        new.replace(self._path(key))
        return Reply(True, Stored(value, stamp), now)
