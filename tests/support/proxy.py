"""A TCP proxy that can cut its connections and delay replies: few servers can do either."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

CHUNK = 1 << 16  # bytes per read; messages here have a few hundred
WITHIN = 10.0  # seconds for one step of the loop on a busy machine


class Proxy:
    """Forwards a port of 127.0.0.1 to another one, on a thread with its own event loop.

    Attributes:
        delay: seconds until a reply is passed on.
    """

    delay = 0.0

    def __init__(self, target: int) -> None:
        self._target = target
        self._pairs: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> int:
        """Aborts all connections, and returns their number."""
        return self._call(self._cut())

    def close(self) -> None:
        """Stops listening and aborts all connections."""
        self._server.close()
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(WITHIN)

    async def _cut(self) -> int:
        pairs = list(self._pairs)
        for pair in pairs:
            pair.cancel()
        await asyncio.gather(*pairs, return_exceptions=True)
        return len(pairs)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pairs.add(task)
        back: asyncio.StreamWriter | None = None
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            ways = [asyncio.ensure_future(self._pump(reader, back, replies=False))]
            ways.append(asyncio.ensure_future(self._pump(there, writer, replies=True)))
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
        except (OSError, asyncio.CancelledError):
            pass  # dropped, by either end or by `cut`
        finally:
            self._pairs.discard(task)
            for end in (writer, back):
                if end is not None:
                    end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK):
                if replies and self.delay:
                    await asyncio.sleep(self.delay)
                writer.write(data)
                await writer.drain()
