"""Reads many records: filters, progress, and an early stop.

A store may hold millions of records, and Redis reads each of them. The operator sees how many were read, may stop
(Ctrl-C or ``--within``), and still gets what was found. The last line and the exit status then say that there is more.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, TypeVar

import click
from celery.bin.base import CeleryOption

from celery_idem.core import keys
from celery_idem.engine.entries import Entry
from celery_idem.operate.operators import Which

F = TypeVar("F", bound=Callable[..., Any])

SHOW_EVERY = 0.5
"""Seconds between two progress messages."""

LINES = 50
"""Lines that a list prints by default: about a screen."""

NOT_ALL = 3
"""Exit status of a command that stopped early. 1 is an error, and 2 is wrong usage."""

AGE = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class Age(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # a generic class in new versions of click
    """A duration in seconds, or with a unit: ``90``, ``15m``, ``2h``, ``1d``."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = AGE.fullmatch(value.strip())
        if found is None:
            self.fail(f"{value!r} is not a duration. Give seconds, or 15m, 2h, 1d.", param, ctx)
        return float(found[1]) * UNITS[found[2]]


class Time(Age):
    """A time in seconds since the epoch, from ISO 8601 or from how long ago it was.

    A time without a zone is in this machine's time zone.
    """

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if AGE.fullmatch(value.strip()):
            return time.time() - super().convert(value, param, ctx)
        try:
            return datetime.fromisoformat(value.strip().replace("Z", "+00:00")).timestamp()
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is not a time. Give 2026-11-28T14:03, or how long ago: 15m, 2h, 1d.", param, ctx
            )


def filters(function: F) -> F:
    """Add the options that filter intents. The function receives them as ``which``."""

    @wraps(function)
    def filtered(
        *args: Any,
        task: str | None,
        scope: str | None,
        reason: str,
        older_than: float,
        since: float,
        state: str | None = None,
        **options: Any,
    ) -> Any:
        which = Which(state, task, keys.label("scope", scope), older_than, since, reason=reason)
        return function(*args, which=which, **options)

    made: Any = filtered
    for option in (
        click.option(
            "--since", type=Time(), default=0.0, help="Only those changed since: 2026-11-28T14:03, or 2h."
        ),
        click.option(
            "--older-than",
            type=Age(),
            default=0.0,
            help="Only those unchanged for that long: 90 (seconds), 15m, 2h, 1d.",
        ),
        click.option(
            "--reason", default="", metavar="TEXT", help="Only those with this text in the reason of doubt."
        ),
        click.option("--scope", help="Only those of this scope."),
        click.option("--task", help="Only those of this task."),
    ):
        made = option(made)
    return made  # type: ignore[no-any-return]


def arguments_option(*sources: str) -> Callable[[F], F]:
    """Return the option ``--arguments``. ``sources`` names the places where they are read without it."""
    return click.option(
        "--arguments",
        type=click.File("rb"),
        help='Arguments of the calls, as JSON lines {"key": …, "args": […], "kwargs": {…}}; "-" for standard input. '
        f"Without it they are read from {' or from '.join(sources)} (with result_extended=True).",
    )


within_option = click.option(
    "--within",
    type=click.FloatRange(min=0.0),
    metavar="SECONDS",
    cls=CeleryOption,
    help=f"Stop after that many seconds and report what was read (exit status {NOT_ALL}). Ctrl-C does the same.",
)


def shown() -> bool:
    """Whether an operator sees standard error."""
    return sys.stderr.isatty()


class Progress:
    """A count on standard error, if that is a terminal.

    Args:
        says: text with ``{}`` for the count.
        quiet: show nothing.
    """

    def __init__(self, says: str, quiet: bool = False) -> None:
        self._says = says
        self._shows = not quiet and shown()
        self._show_at = time.monotonic() + SHOW_EVERY
        self.count = 0

    def tick(self) -> None:
        """Count one more."""
        self.count += 1
        if self._shows and time.monotonic() >= self._show_at:
            self._show_at = time.monotonic() + SHOW_EVERY
            click.echo("\r" + self._says.format(f"{self.count:,}"), nl=False, err=True)

    def end(self) -> None:
        """Clear the line."""
        if self._shows:
            click.echo("\r" + " " * (len(self._says) + 10) + "\r", nl=False, err=True)


class Reading:
    """The entries that can be read in time.

    Args:
        read: returns the entries, and calls its argument for every record that it reads.
        within: seconds until it stops; None: read all.
        quiet: show no progress. Progress goes to standard error, and only to a terminal.

    Attributes:
        stopped: it stopped early, so there may be more entries.
    """

    def __init__(
        self,
        read: Callable[[Callable[[], object]], Iterable[Entry]],
        within: float | None,
        quiet: bool = False,
    ) -> None:
        self._read = read
        self._until = float("inf") if within is None else time.monotonic() + within
        self._progress = Progress("{} read; Ctrl-C stops here", quiet)
        self.stopped = False

    @property
    def count(self) -> int:
        """Number of records read."""
        return self._progress.count

    def __iter__(self) -> Iterator[Entry]:
        try:
            yield from self._read(self._tick)
        except KeyboardInterrupt:
            self.stopped = True
        finally:
            self._progress.end()

    def _tick(self) -> None:
        if time.monotonic() >= self._until:
            raise KeyboardInterrupt
        self._progress.tick()

    def end(self) -> None:
        """If it stopped early, say so and exit."""
        if self.stopped:
            click.echo(f"Stopped after {self.count:,} records. There are more, so this is not all.", err=True)
            click.get_current_context().exit(NOT_ALL)
