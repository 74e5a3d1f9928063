"""The command group that the commands register themselves with."""

from __future__ import annotations

from typing import Any

import click


@click.group()
def idem(**_: Any) -> None:
    """Idempotent tasks: see intents, find out what happened, settle what is in doubt."""
