"""MkDocs hooks: the menu, the page of the command line and the list of decisions are made from what is there."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import click

COMMANDS = "<!-- commands -->"
DECISIONS = "<!-- decisions -->"

START = ("index", "tutorial", "is-it-for-me")
"""Pages of the top folder that are the first tab. The others of that folder are the tab "Guarantees"."""

GUARANTEES = ("guarantees", "proof", "performance", "scale", "security", "compatibility")

HOW_TO = {
    "Your tasks": [
        "choose-an-intent",
        "guard-existing-tasks",
        "migrate-from-a-lock",
        "retries",
        "tenants",
        "pydantic",
        "exactly-once-in-sql",
        "outbox",
        "test-your-tasks",
    ],
    "Frameworks": ["django", "flask", "fastapi", "agents", "mcp", "airflow", "beat"],
    "Stores and brokers": ["redis", "redis-that-may-lose-data", "rabbitmq-quorum-queues", "write-a-store"],
    "In production": ["watch", "recovery", "resolve-in-doubt", "game-day", "report-a-double-effect"],
}

EXPLANATION = ["why-not-a-lock", "state-machine", "exactly-once", "fencing", "endings", "record"]

REFERENCE = [
    "task",
    "settings",
    "dispatch",
    "callers",
    "operators",
    "cli",
    "symptoms",
    "http",
    "wire",
    "errors",
    "events",
]

TITLES = {
    "index": "Home",
    "tutorial": "Tutorial",
    "guarantees": "What is guaranteed",
    "scale": "Scale",
    "compatibility": "Versions",
    "how-to/guard-existing-tasks": "Guard existing tasks",
    "how-to/migrate-from-a-lock": "Migrate from a lock",
    "how-to/pydantic": "Pydantic models",
    "how-to/exactly-once-in-sql": "Exactly once in SQL",
    "how-to/outbox": "Submit in your transaction",
    "how-to/retries": "Retries",
    "how-to/redis": "Redis and Valkey",
    "how-to/redis-that-may-lose-data": "Redis that loses data",
    "how-to/recovery": "Recovery",
    "how-to/resolve-in-doubt": "Resolve a doubt",
    "explanation/record": "The record",
    "explanation/state-machine": "State machine",
    "reference/cli": "Command line",
}
"""Titles in the menu where the page's own is longer than a line of the menu."""


def on_config(config: Any) -> Any:
    """Make the menu. A page that stands in none of the lists comes last in the tab of its folder."""
    root = Path(config.docs_dir)

    def entry(name: str) -> dict[str, str]:
        return {_title(root, name): f"{name}.md"}

    def rest(folder: str, listed: list[str]) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        return sorted({f"{prefix}{page.stem}" for page in (root / folder).glob("*.md")} - set(listed))

    def tab(folder: str, names: list[str]) -> list[dict[str, str]]:
        listed = [f"{folder}/{name}" for name in names]
        return [entry(name) for name in [*listed, *rest(folder, listed)]]

    how_to = [f"how-to/{name}" for group in HOW_TO.values() for name in group]
    config.nav = [
        {"Start": [entry(name) for name in START]},
        {
            "How to": [
                *({group: [entry(f"how-to/{name}") for name in names]} for group, names in HOW_TO.items()),
                *(entry(name) for name in rest("how-to", how_to)),
            ]
        },
        {"Explanation": tab("explanation", EXPLANATION)},
        {"Guarantees": [entry(name) for name in [*GUARANTEES, *rest("", [*START, *GUARANTEES])]]},
        {"Reference": tab("reference", REFERENCE)},
        {"Decisions": "adr/README.md"},
    ]
    return config


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Put the commands and the decisions in the places of their marks."""
    if DECISIONS in markdown:
        folder = Path(config.docs_dir) / "adr"
        rows = [f"- [{_heading(page)}]({page.name})" for page in sorted(folder.glob("0*.md"))]
        return markdown.replace(DECISIONS, "\n".join(rows))
    if COMMANDS in markdown:
        from celery_idem.cli import idem

        sections = [_section(name, idem.commands[name]) for name in sorted(idem.commands)]
        return markdown.replace(COMMANDS, "\n".join(sections))
    return markdown


def _title(root: Path, name: str) -> str:
    return TITLES.get(name) or _heading(root / f"{name}.md")


def _heading(page: Path) -> str:
    """The text of the first heading."""
    lines = page.read_text().splitlines()
    return next((line.removeprefix("# ") for line in lines if line.startswith("# ")), page.stem)


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
