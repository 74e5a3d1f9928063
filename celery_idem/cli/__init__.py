"""``celery -A proj idem …``: see intents, trust them, settle them.

Made for somebody who was woken up: every command says what it found, what it will change and
what comes next; nothing that cannot be undone happens without a question. ``--json`` is for
programs, and needs nothing beyond Celery itself.

Exit status: 0 fine, 1 the answer is no (nothing found, a check failed), 2 wrong usage,
3 stopped before all was read (see ``reading``).
"""

from __future__ import annotations

from celery_idem.cli import checking, key, records, settling
from celery_idem.cli.group import idem

# Imported above so that the commands are in the group.
_COMMANDS = (records, settling, checking, key)

__all__ = ["idem"]
