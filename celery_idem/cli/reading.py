"""Reading many records for a person who waits: how far it is, and an end before the end.

A store may hold millions, and on Redis each of them is looked at. So whoever waits sees how
many were read, and may stop it (Ctrl-C, or ``--within``) and still gets what was found until
then. That it is not all is said where it cannot be missed, and in the exit status.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator

import click
from celery.bin.base import CeleryOption

from celery_idem.engine.entries import Entry

SHOW_EVERY = 0.5
"""Seconds between two signs of progress: often enough to see that it moves."""

NOT_ALL = 3
"""Exit status of a command that stopped early. 1 is an error, 2 a wrong use of the command line."""

within_option = click.option(
    "--within",
    type=click.FloatRange(min=0.0),
    metavar="SECONDS",
    cls=CeleryOption,
    help=f"Stop reading after that long and go by what was read (exit status {NOT_ALL} then). Ctrl-C does the same.",
)


class Reading:
    """Entries, as long as there is time.

    Args:
        read: gives them; it calls what it is given for every record it looks at, wanted or not.
        within: seconds; None: all of them.
        quiet: show no progress. It is shown on standard error, and only to a terminal.

    Attributes:
        count: how many were read.
        stopped: there may be more.
    """

    def __init__(
        self,
        read: Callable[[Callable[[], object]], Iterable[Entry]],
        within: float | None,
        quiet: bool = False,
    ) -> None:
        self._read = read
        self._until = float("inf") if within is None else time.monotonic() + within
        self._shows = not quiet and sys.stderr.isatty()
        self._show_at = time.monotonic() + SHOW_EVERY
        self.count = 0
        self.stopped = False

    def __iter__(self) -> Iterator[Entry]:
        try:
            yield from self._read(self._tick)
        except KeyboardInterrupt:
            self.stopped = True
        finally:
            if self._shows:
                click.echo("\r" + " " * 40 + "\r", nl=False, err=True)

    def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._until:
            raise KeyboardInterrupt
        self.count += 1
        if self._shows and now >= self._show_at:
            self._show_at = now + SHOW_EVERY
            click.echo(f"\r{self.count:,} read; Ctrl-C stops here", nl=False, err=True)

    def end(self) -> None:
        """Say that it was not all, where that is so, and exit."""
        if self.stopped:
            click.echo(f"Stopped after {self.count:,} records: there are more, so this is not all.", err=True)
            click.get_current_context().exit(NOT_ALL)
