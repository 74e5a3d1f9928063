"""MkDocs hooks: the menu is made from the folders, the page of the command line from the commands."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

MARK = "<!-- commands -->"

FIRST = ("index.md", "tutorial.md", "guarantees.md")
"""Pages that come before the others of the top folder."""

SECTIONS = {"how-to": "How to", "explanation": "Explanation", "reference": "Reference", "adr": "Decisions"}
"""Folders in the order of the menu. A page is in the menu because it is in one of them."""


def on_config(config: Any) -> Any:
    """Make the menu."""
    root = Path(config.docs_dir)
    top = sorted(
        (p.name for p in root.glob("*.md")),
        key=lambda name: (name not in FIRST, FIRST.index(name) if name in FIRST else 0, name),
    )
    sections = [
        {title: sorted(f"{folder}/{p.name}" for p in (root / folder).glob("*.md"))}
        for folder, title in SECTIONS.items()
    ]
    config.nav = [*top, *sections]
    return config


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
