"""The commands of ``celery -A proj idem …``: list, inspect and settle intents, and check the set-up.

Every command says what it found, what it will change and what to do next. It asks before anything that cannot be
undone. ``--json`` is for programs and needs no package beyond Celery.

Exit status: 0 success; 1 nothing found, or a check failed; 2 wrong usage; 3 stopped before everything was read.
"""

from __future__ import annotations

from celery_idem.cli import checking, deciding, key, records, retrying, sealing, serving, settling
from celery_idem.cli.screen import idem

# Importing them adds the commands to the group.
_COMMANDS = (records, deciding, serving, settling, retrying, sealing, checking, key)

__all__ = ["idem"]
