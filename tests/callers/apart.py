"""The shop's worker with broker, results and store on three servers."""

from __future__ import annotations

import os

from tests.callers.shop import FOLDER, URL, make

app = make(URL, FOLDER, result_backend=os.environ["CALLERS_RESULTS"], idem_store=os.environ["CALLERS_STORE"])
