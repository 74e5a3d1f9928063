"""Creates a thousand intents, forty of them in doubt, as after an incident.

::

    python -m tests.operators.thousand redis://localhost:6379/0

fills a store, to be viewed with the command line or the inbox.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from celery import Celery

from celery_idem import Ledger
from tests.operators.intents import claimed, in_doubt, succeeded
from tests.operators.shop import send_invoice

INTENTS = 1000
IN_DOUBT = 40


def key(n: int) -> str:
    return send_invoice.intent_key(f"cus-{n}", n)


def fill(app: Celery) -> list[str]:
    """Create the intents and return the keys of those in doubt. Some of the others are running."""
    ledger = Ledger.from_app(app)
    doubtful = []
    for n in range(INTENTS):
        if n % (INTENTS // IN_DOUBT) == 0:
            in_doubt(ledger, key(n))
            doubtful.append(key(n))
        elif n % 100 == 1:
            claimed(ledger, key(n), lease=600)
        else:
            succeeded(ledger, key(n), f"inv-cus-{n}-{n}")
    assert len(doubtful) == IN_DOUBT
    return doubtful


def destination() -> dict[str, str]:
    """Return what billing knows: every second intent in doubt did happen."""
    doubtful = range(0, INTENTS, INTENTS // IN_DOUBT)
    return {f"cus-{n}": f"inv-from-billing-{n}" for n in list(doubtful)[::2]}


def arguments(path: Path) -> Path:
    """Write the arguments of the calls in doubt to a file, as an orchestrator's log has them."""
    lines = [{"key": key(n), "args": [f"cus-{n}", n]} for n in range(0, INTENTS, INTENTS // IN_DOUBT)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


if __name__ == "__main__":
    os.environ.setdefault("IDEM_TEST_DESTINATION", "/dev/null")
    from tests.operators.conftest import use_store
    from tests.operators.shop import app as shop

    use_store(shop, sys.argv[1])
    print(f"{len(fill(shop))} of {INTENTS} intents are in doubt in {sys.argv[1]}")
