"""A scripted agent that retries a tool as a language model does.

The goal stays the same, and the calls vary: every plan has another free text and another order of arguments, passes
some by position, and leaves out or writes a default. A seed makes every run the same.

As a program it reads its goals as one JSON line, pursues them at once, and writes what each sees and gets:

    [{"customer_id": "acme", "invoice_id": "lost-0", "cents": 4200}]
    {"goal": 0, "says": "call 1: send_invoice('acme', cents=4200, invoice_id='lost-0', note='…')"}
    {"goal": 0, "outcome": "done", "answer": {…}, "calls": 2}
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
from collections.abc import Callable
from typing import Any

from example_project import witness
from example_project.orchestrator import Answer, dispatch

# Seconds that the agent waits for a tool: shorter than the stalled answer in `faults`, so that it gives up.
PATIENCE = 1.5
MAX_CALLS = 6  # agent hosts have such a limit; no goal here needs as many calls

TASK = "billing.send_invoice"
PARAMETERS = ("customer_id", "invoice_id", "cents", "currency", "note")
NOTES = (
    "Thank you for your business.",
    "Thanks a lot for working with us!",
    "As discussed, here is your invoice.",
    "Please find your invoice attached. Trying again because the first attempt failed.",
    "Kind regards, your billing team",
    "We appreciate your prompt payment.",
)


def plan(goal: dict[str, Any], random_: random.Random) -> tuple[list[Any], dict[str, Any]]:
    """Return one of many spellings of the same call: positional and keyword arguments."""
    values = {**goal, "currency": "EUR", "note": random_.choice(NOTES)}
    positional = random_.randint(0, 3)
    named = list(PARAMETERS[positional:])
    if random_.random() < 0.5:
        named.remove("currency")  # it is the default
    random_.shuffle(named)
    return [values[name] for name in PARAMETERS[:positional]], {name: values[name] for name in named}


def pursue(goal: dict[str, Any], seed: str, says: Callable[[str], None]) -> tuple[Answer, int]:
    """Call and plan again until it is done, at most ``MAX_CALLS`` times. Return the last answer and the calls made."""
    random_ = random.Random(seed)
    count = 0
    while True:
        count += 1
        args, kwargs = plan(goal, random_)
        said = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        says(f"calls send_invoice({said})")
        answer = dispatch(TASK, args, kwargs, patience=PATIENCE)
        says(f"sees  {answer.seen}")
        if answer.outcome == "done" or count == MAX_CALLS:
            return answer, count


def main() -> int:
    parser = argparse.ArgumentParser(description="The example's scripted agent.")
    parser.add_argument("--seed", default="7")
    seed = parser.parse_args().seed
    witness.note("ready", who="agent")
    goals = json.loads(sys.stdin.readline())
    lock = threading.Lock()

    def tell(**fields: Any) -> None:
        with lock:
            print(json.dumps(fields), flush=True)

    def run(number: int) -> None:
        answer, calls = pursue(goals[number], f"{seed}-{number}", lambda text: tell(goal=number, says=text))
        tell(goal=number, outcome=answer.outcome, answer=answer.answer, calls=calls)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(goals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
