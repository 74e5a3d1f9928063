"""The same application without the claim in the runner: every body runs, whatever the record says.

`FAULTS_APP=tests.faults.unguarded pytest tests/faults` has to fail; see CONTRIBUTING.md.
"""

from __future__ import annotations

from celery_idem.engine.runner import Runner
from tests.celery import unguarded  # the import removes the claim
from tests.faults import app as faults

assert Runner.run is unguarded.run

app = faults.app
