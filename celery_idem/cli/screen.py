"""The command group, and the output of its commands: JSON for programs, rich for people."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click
from celery import _state
from celery.bin.base import CeleryCommand, CeleryOption

from celery_idem.core.errors import ConfigurationError, IdempotencyError, StoreError
from celery_idem.operate.operators import Operator

if TYPE_CHECKING:
    from celery import Celery
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

COLOURS = {
    "in_doubt": "bold red", "lapsed": "red", "failed": "yellow", "running": "cyan", "scheduled": "cyan",
    "released": "blue", "cancelled": "blue", "succeeded": "green",
    "error": "bold red", "warning": "yellow", "note": "blue",
    "ready": "bold green", "look": "bold yellow", "wait": "blue",
}  # fmt: skip
"""Colours of states, severities and verdicts. The word is always shown too."""

DEFAULT_NAME = "default"
"""Name of the application that Celery makes if the command line names none."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and newline: ESC, and the one-byte forms of terminal commands."""


def cannot_listen(address: str, port: int, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"Cannot listen on {address}:{port} ({error.strerror}). Give another --port or --address."
    )


yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")

PIPE_WIDTH = 200
"""Columns when the output is not a terminal: whole lines, for grep."""


SHOWN = 200
"""Characters of a wrong value that an error repeats: a line or two."""


class Screen:
    """One command's output. ``as_json``: write only JSON to standard output."""

    def __init__(self, as_json: bool, no_color: bool = False) -> None:
        self.as_json = as_json
        self.no_color = no_color or "NO_COLOR" in os.environ
        self._console: Console | None = None

    @property
    def console(self) -> Console:
        """Standard output for people. Raises ``ConfigurationError``: rich is not installed."""
        if self._console is None:
            try:
                from rich.console import Console
            except ImportError:
                raise ConfigurationError(
                    "This command prints with rich, which is not installed: pip install 'celery_idem[cli]', or use "
                    "--json."
                ) from None
            tty = sys.stdout.isatty()
            self._console = Console(
                no_color=self.no_color, highlight=False, soft_wrap=True, width=None if tty else PIPE_WIDTH
            )
        return self._console

    def line(self, text: str = "", style: str = "") -> None:
        """Print a line for people, without wrapping and markup."""
        self.console.print(printable(text), style=style or None, markup=False)

    def state(self, name: str, rest: str) -> None:
        """Print a line that begins with a state or a severity in its colour."""
        from rich.text import Text

        self.console.print(Text.assemble((f"{name:<10}", COLOURS.get(name, "")), " ", printable(rest)))

    def json(self, value: Any) -> None:
        """Print one JSON document on one line."""
        # JSON needs no escape for some control characters, and a terminal obeys them.
        text = json.dumps(value, ensure_ascii=False, default=str)
        if not _fits(text):
            text = json.dumps(value, default=str)
        click.echo(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))

    def answer(self, value: Any, text: str) -> None:
        """Print one document for programs, or one line for people."""
        if self.as_json:
            self.json(value)
        else:
            self.line(text)

    def confirm(self, question: str, yes: bool) -> None:
        """Ask a question, and return only if the operator agrees.

        Raises:
            click.ClickException: the operator declined, or cannot be asked, and ``--yes`` was not given.
        """
        if yes:
            return
        try:
            click.confirm(printable(question), abort=True, err=True)
        except click.Abort:
            raise click.ClickException("Nothing was changed. (--yes answers the question.)") from None

    def confirm_number(self, question: str, number: int, yes: bool) -> None:
        """Ask like ``confirm``, for many intents at once: the operator types their number.

        Raises:
            click.ClickException: see ``confirm``.
        """
        if yes:
            return
        typed = ""
        with contextlib.suppress(click.Abort):
            typed = click.prompt(printable(f"{question} Type {number} to go on"), default="", err=True)
        if typed.strip().replace(",", "") != str(number):
            raise click.ClickException("Nothing was changed. (--yes answers the question.)")

    def ask(self, question: str, option: str) -> str:
        """Return the operator's answer.

        Raises:
            click.ClickException: the operator cannot be asked, and the option was not given.
        """
        try:
            answer: str = click.prompt(question, err=True)
        except click.Abort:
            raise click.ClickException(f"Nothing was changed. ({option} answers the question.)") from None
        return answer


def _fits(text: str) -> bool:
    """Whether standard output can show every character: not half of a surrogate pair, and not what Latin-1 has not."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _escape_what_does_not_fit() -> None:
    """Let standard output show an escape for such a character, instead of failing. Standard error does so anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Return the text with visible control characters: text from a record must not send commands to the terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def summary(words: Mapping[str, str], counts: Mapping[str, int], dry_run: bool) -> str:
    """Return how many intents have each verdict, in words."""
    said = ", ".join(f"{counts[verdict]:,} {word}" for verdict, word in words.items())
    return f"{said}.{' Nothing was changed.' if dry_run else ''}"


def _next(error: IdempotencyError, app: Celery) -> str:
    """Return advice on an error that only the command line can give."""
    # In a Django site, and in Flask's pattern, the application that was named is the default too.
    if isinstance(error, ConfigurationError) and app is _state.default_app and app.main == DEFAULT_NAME:
        return " Did you name your application? celery -A proj idem …"
    if isinstance(error, StoreError) and not error.key:  # it is about the whole store
        return " `idem doctor` checks the store and its settings."
    return ""


@click.group()
def idem(**_: Any) -> None:
    """Idempotent tasks: list intents, find out what happened, settle what is in doubt."""
    # The commands report what they did. Without a handler Python would print each event as well.
    logging.getLogger("celery_idem").addHandler(logging.NullHandler())


def command(name: str) -> Callable[[F], click.Command]:
    """Make a function ``(screen, operator, **options)`` a command of the group, with ``--json``.

    An error of celery_idem becomes a message and exit status 1.
    """

    def decorate(function: F) -> click.Command:
        @wraps(function)
        def run(ctx: click.Context, as_json: bool, **options: Any) -> None:
            app = ctx.obj.app
            screen = Screen(as_json, getattr(ctx.obj, "no_color", False))
            _escape_what_does_not_fit()
            try:
                if not as_json:
                    _ = screen.console  # fails before anything is changed if rich is missing
                app.loader.import_default_modules()
                function(screen, Operator(app), **options)
            except IdempotencyError as error:
                raise click.ClickException(printable(f"{error}{_next(error, app)}")) from error

        words = "Print JSON for programs."
        body: Any = click.option("--json", "as_json", is_flag=True, cls=CeleryOption, help=words)(run)
        made: click.Command = idem.command(name, cls=CeleryCommand)(click.pass_context(body))
        return made

    return decorate
