"""The shop with a beat schedule. Each beat runs in a separate process."""

from __future__ import annotations

import os

from tests.callers.shop import FOLDER, URL, make

NAME = os.environ["CALLERS_TICKER"]
app = make(
    URL,
    FOLDER,
    beat_schedule={
        "often": {"task": "shop.number", "schedule": 1.0, "args": (NAME, 1), "options": {"expires": 60}},
        "by name": {"task": "shop.pay", "schedule": 1.0, "args": (NAME, "7", 1)},
        "once": {
            "task": "shop.number",
            "schedule": 1.0,
            "args": (NAME, 2),
            "options": {"occurrence": "always"},
        },
    },
)
del app.tasks["shop.pay"]  # beat then sends this task by name, without its class
