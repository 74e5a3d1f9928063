"""MkDocs hook: the page of the command line is written from the commands themselves."""

from __future__ import annotations

import inspect
from typing import Any

import click

MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands in the place of the mark."""
    if MARK not in markdown:
        return markdown
    from celery_idem.cli import idem

    return markdown.replace(
        MARK, "\n".join(_section(name, idem.commands[name]) for name in sorted(idem.commands))
    )


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"celery -A proj idem {name}")
    lines = [
        f"## {name}",
        "",
        "```console",
        f"$ {command.get_usage(context).removeprefix('Usage: ')}",
        "```",
        "",
    ]
    lines += [inspect.cleandoc(command.help or ""), ""]
    options = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if options:
        lines += ["| option | |", "|---|---|"]
        lines += [f"| `{names}` | {_cell(text)} |" for names, text in options]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")
