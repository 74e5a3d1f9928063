"""The command group that the commands register themselves with."""

from __future__ import annotations

import logging
from typing import Any

import click


@click.group()
def idem(**_: Any) -> None:
    """Idempotent tasks: see intents, find out what happened, settle what is in doubt."""
    # The commands say what they did. Without a handler Python would print each event beside it.
    logging.getLogger("celery_idem").addHandler(logging.NullHandler())
