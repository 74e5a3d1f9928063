"""The story of one intent: all entries about it in order of time, and the faults at that time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.chaos.plan import Intent

LINES = 60  # the most lines of one story

_STAMP = re.compile(r"^\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})")

Moments = list[tuple[float, str]]


def story(
    ref: str,
    intent: Intent | None,
    key: str,
    start: float,
    effects: Iterable[Mapping[str, Any]],
    requests: Iterable[Mapping[str, Any]],
    answers: Iterable[Mapping[str, Any]],
    faults: Iterable[Mapping[str, Any]],
    logs: Iterable[Path],
) -> list[str]:
    """Return lines, the oldest first, with the seconds since `start` (seconds since the epoch)."""
    moments: Moments = []
    for effect in effects:
        if effect["intent"] == ref:
            who = (
                f"{effect.get('worker', '')} process {effect.get('body_pid', '')} fence {effect.get('fence')}"
            )
            moments.append((effect["at"], f"EFFECT {effect['part']}: receipt {effect['receipt']}, {who}"))
    for request in requests:
        if request["intent"] == ref:
            asked = request["request"]
            moments.append(
                (request["at"], f"destination: {asked['do']} {asked['part']} -> {request['told']}")
            )
    for answer in answers:
        if answer["intent"] == ref:
            who = f"caller {answer['call'] + 1} ({answer['door']}, {answer['broker']})"
            for one in answer["tries"]:
                moments.append((one["at"], f"{who} calls"))
                detail = f" ({one['detail']})" if one["detail"] else ""
                moments.append((one["at"] + one["took"], f"{who} is told: {one['told']}{detail}"))
    moments += _logged(key, logs) if key else []
    if moments:
        first, last = min(moments)[0] - 1.0, max(moments)[0] + 1.0
        for fault in faults:
            if fault["began"] <= last and fault["ended"] >= first:
                lasted = f", {fault['ended'] - fault['began']:.1f} s" if fault["ended"] else ""
                moments.append((fault["began"], f"FAULT {fault['intent']} {fault['broker']}{lasted}"))
    lines = [f"{at - start:8.3f}  {text}" for at, text in sorted(moments)]
    if intent is not None:
        lines.insert(0, f"meant: {intent.task}, {intent.cents} cents, {len(intent.calls)} callers, {intent}")
    return [*lines[:LINES], f"… {len(lines) - LINES} lines more"] if len(lines) > LINES else lines


def _logged(key: str, logs: Iterable[Path]) -> Moments:
    """Return the log lines that name the key, with their times."""
    found: Moments = []
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            stamp = _STAMP.match(line)
            if key in line and stamp:
                at = time.mktime(datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S").timetuple())  # noqa: DTZ007
                found.append((at + int(stamp[2]) / 1000, f"{log.stem}: {line[len(stamp[0]) :][:240]}"))
    return found
