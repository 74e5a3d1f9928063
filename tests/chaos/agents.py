"""A process of agents: it makes the calls of a work file and writes down what each caller received.

    python -m tests.chaos.agents WORK ANSWERS

An agent calls again through the same door, with other words, if it receives nothing in time or an error that does not
say what happened. It stops when it receives a value, a refusal or "in doubt", and at the deadline.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos import doors, shop
from tests.chaos.plan import Call
from tests.support.effects import Effects

# Callers at once. Enough for fifty calls a second while the store is down for some seconds and a lease must lapse.
THREADS = 150

STOP = "stop"  # a file in the run's folder: if it exists, agents write down what they received, and end

PAUSE = (0.2, 2.0)  # seconds until an agent calls again: the first pause and the longest

# An agent waits longer each time. Otherwise a slow minute doubles the messages, and they slow the machine even more.
MORE_PATIENCE = 1.7
LONGEST_PATIENCE = 25.0  # seconds


@dataclass(frozen=True)
class Work:
    """The calls of one process.

    `calls` are (number of the intent, place among its calls, the call). The times of calls count from `start`.
    """

    start: float
    deadline: float
    calls: list[tuple[int, int, Call]]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Work:
        values = json.loads(path.read_text())
        return cls(
            values["start"], values["deadline"], [(i, n, Call(**call)) for i, n, call in values["calls"]]
        )


def call_until_told(number: int, place: int, call: Call, deadline: float, answers: Effects) -> None:
    intent = shop.PLAN.intent(number)
    door = doors.DOORS[call.door]
    began = time.time()
    tries: list[dict[str, Any]] = []
    pause, patience = PAUSE[0], call.patience
    while True:
        asked = time.time()
        try:
            told = door(intent, f"in other words {len(tries)}", patience)
        except Exception as error:  # an error of any driver: the reply is lost
            told = doors.Told(doors.AGAIN, detail=f"{type(error).__name__}: {error}"[:300])
        tries.append({"at": asked, "told": told.kind, "detail": told.detail, "took": time.time() - asked})
        if told.kind != doors.AGAIN or time.time() + pause > deadline or (shop.FOLDER / STOP).exists():
            break
        time.sleep(pause)
        pause, patience = min(pause * 1.5, PAUSE[1]), min(patience * MORE_PATIENCE, LONGEST_PATIENCE)
    answers.add(
        intent.ref,
        call=place,
        door=call.door,
        broker=call.broker,
        began=began,
        ended=time.time(),
        told=told.kind,
        value=told.value,
        tries=tries,
    )


def main() -> None:
    work, answers = Work.read(Path(sys.argv[1])), Effects(sys.argv[2])
    shop.app.finalize()
    with ThreadPoolExecutor(THREADS) as threads:
        for number, place, call in sorted(work.calls, key=lambda one: one[2].at):
            time.sleep(max(0.0, work.start + call.at - time.time()))
            threads.submit(call_until_told, number, place, call, work.deadline, answers)


if __name__ == "__main__":
    main()
