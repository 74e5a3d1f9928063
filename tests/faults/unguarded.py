"""The same worker with the claim taken out of the runner: every body runs, whatever is known.

`FAULTS_APP=tests.faults.unguarded pytest tests/faults` has to fail; see CONTRIBUTING.md.
"""

from __future__ import annotations

from celery_idem.engine.runner import Runner
from tests.celery import unguarded  # importing it takes the claim out
from tests.faults import app as faults

assert Runner.run is unguarded.run

app = faults.app
