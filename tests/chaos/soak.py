"""Runs the soak: start everything, break things, drain, settle, count and report.

    python -m tests.chaos --minutes 3 --seed 7        (or: make chaos ARGS="--minutes 3 --seed 7")

Exit status: 0 if every promise was kept, 1 if one was not, 2 if a server is missing here.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import clerk, report
from tests.chaos.agents import STOP, Work
from tests.chaos.count import judge
from tests.chaos.monkey import Monkey, Waker
from tests.chaos.plan import BROKERS, FAULTS, Call, Plan
from tests.chaos.stage import Stage
from tests.chaos.story import story
from tests.support.effects import Effects
from tests.support.processes import Program
from tests.support.servers import ServerMissingError

# Default number of intents a minute. It makes about forty calls a second, as many as two cores can do.
PER_MINUTE = 800

# Time after the last call in which the last caller must receive its result: this many seconds, plus this many times
# the length of the run, because messages pile up on a busy machine. Callers that call again have as long once more.
DRAIN = (120.0, 2.0)

# Seconds without any answer after which the run stops waiting. A lease lapses in two seconds, a worker is back within
# ten, and an agent calls again within thirty.
STALLED = 90.0

# More seconds for agents to write down what they received: longer than agents.LONGEST_PATIENCE.
GRACE = 40.0

# How often the operator settles and callers call again, at most. It ends when nothing is in doubt and all callers have
# an answer. One turn may not be enough: an execution that the operator allowed may meet its planned fate; a caller may
# receive "in doubt" just before a late owner settles; and on a busy machine a lease of two seconds may lapse. What is
# not settled after all turns is a fault.
TURNS = 6

STORIES = 3  # how many intents with violations are reported in full


@dataclass(frozen=True)
class Options:
    """The options of a run. `app` is the workers' application (see `Stage`); all files are written to `folder`."""

    plan: Plan
    folder: Path
    report: Path | None = None
    app: str = "tests.chaos.shop:app"

    @property
    def replay(self) -> str:
        """The command that runs the same plan again."""
        plan = self.plan
        words = [
            "python",
            "-m",
            "tests.chaos",
            "--seed",
            str(plan.seed),
            "--minutes",
            f"{plan.seconds / 60:g}",
        ]
        words += ["--intents", str(plan.count)]
        if plan.brokers != BROKERS:
            words += ["--brokers", ",".join(plan.brokers)]
        if plan.kinds != tuple(FAULTS):
            words += ["--only", ",".join(plan.kinds)]
        if self.app != Options.app:
            words += ["--app", self.app]
        return shlex.join(words)


def run(options: Options, show: Callable[[str], None]) -> report.Run:
    """Run a plan. `show` is called about twice a second with a line of progress.

    Raises:
        ServerMissingError: a server is not installed here.
        AssertionError: something that no fault touches did not start, or did not end.
    """
    plan, folder = options.plan, options.folder
    drain = DRAIN[0] + DRAIN[1] * plan.seconds
    show("starting brokers, store, workers, doors, beats")
    with Stage(folder, plan, options.app) as stage, Waker(folder, plan):
        # Agents need some seconds for their imports before the first call.
        start = time.time() + 5.0
        calls = [(i.number, n, call) for i in plan.intents() for n, call in enumerate(i.calls)]
        agents = _agents(stage, "agents", start, start + plan.seconds + drain, calls)
        monkey = Monkey(stage, plan.faults(), folder / "faults.jsonl")
        monkey.start(start)
        began = time.time()
        try:
            while time.time() < start + plan.seconds:
                show(_progress(folder, start, plan, monkey))
                time.sleep(0.5)
        finally:
            monkey.stop()
        _wait(
            folder, agents, start + plan.seconds + drain, lambda: show(f"draining  {_counts(folder, plan)}")
        )
        show("the operator settles what is in doubt")
        records = clerk.Records(stage)
        try:
            settled: list[clerk.Settled] = []
            for turn in range(1, TURNS + 1):
                decided = clerk.settle(stage, plan, records)
                settled += decided
                again = _unanswered(folder, calls)
                if not again and not decided:
                    break
                now = time.time()
                agents = _agents(stage, f"asking-again-{turn}", now, now + drain, again)
                _wait(folder, agents, now + drain, lambda: show("callers ask again"))
            show("counting")
            entries = records.all()
            keys = {intent.ref: records.key(intent) for intent in plan.intents()}
            states = {ref: entries[key].state for ref, key in keys.items() if key in entries}
            reconciled = sum(
                any(note.by == "reconcile" for note in entry.record.notes) for entry in entries.values()
            )
        finally:
            records.close()
        logs = stage.logs()
        starts = {name: worker.starts for name, worker in stage.workers.items()}
    ledger = [
        Effects(folder / f"{name}.jsonl").all() for name in ("effects", "requests", "answers", "faults")
    ]
    effects, requests, answers, faults = ledger
    verdict = judge(plan.intents(), effects, answers, states)
    stories: dict[str, list[str]] = {}
    for violation in verdict.violations:
        if violation.ref not in stories and len(stories) < STORIES:
            ref = violation.ref
            intent = plan.intent(int(ref[1:])) if ref in keys else None
            key = keys.get(ref, ref)
            stories[ref] = story(ref, intent, key, start, effects, requests, answers, faults, logs)
    return report.Run(
        plan=plan,
        replay=options.replay,
        began=began,
        start=start,
        took=time.time() - began,
        verdict=verdict,
        effects=effects,
        requests=requests,
        answers=answers,
        faults=faults,
        settled=settled,
        reconciled=reconciled,
        starts=starts,
        alarms=sum(log.read_text(errors="replace").count(" stale_settle ") for log in logs),
        stories=stories,
    )


# -- parts --------------------------------------------------------------------------------------------------
def _agents(
    stage: Stage, name: str, start: float, deadline: float, calls: list[tuple[int, int, Call]]
) -> list[Program]:
    """Start one process of agents for each broker that has a call."""
    found = []
    for broker in stage.plan.brokers:
        mine = [(number, place, call) for number, place, call in calls if call.broker == broker]
        if mine:
            found.append(stage.start_agents(name, broker, Work(start, deadline, mine)))
    return found


def _wait(folder: Path, agents: list[Program], until: float, look: Callable[[], None]) -> None:
    """Return when the agents are done. They are stopped at `until`, or if no answer comes for `STALLED` seconds."""
    answers = folder / "answers.jsonl"
    stop = folder / STOP
    heard, at = 0, time.time()
    while any(agent.alive for agent in agents) and time.time() < until + GRACE:
        look()
        size = answers.stat().st_size if answers.exists() else 0
        if size > heard:
            heard, at = size, time.time()
        if time.time() > min(until, at + STALLED) and not stop.exists():
            stop.touch()
            until = time.time()
        time.sleep(0.5)
    for agent in agents:
        agent.kill()
    stop.unlink(missing_ok=True)


def _unanswered(folder: Path, calls: list[tuple[int, int, Call]]) -> list[tuple[int, int, Call]]:
    """Return the calls whose callers received "in doubt" or nothing, to be made again now."""
    known = {
        (int(str(a["intent"])[1:]), a["call"]): a["told"] for a in Effects(folder / "answers.jsonl").all()
    }
    return [
        (number, place, Call(0.0, call.door, call.broker, 6.0))
        for number, place, call in calls
        if known.get((number, place), "again") in ("in doubt", "again")
    ]


def _progress(folder: Path, start: float, plan: Plan, monkey: Monkey) -> str:
    at = max(0.0, time.time() - start)
    return (
        f"{at:5.0f} of {plan.seconds:.0f} s  {_counts(folder, plan)}  {monkey.done} faults  {monkey.current}"
    )


def _counts(folder: Path, plan: Plan) -> str:
    def lines(name: str) -> int:
        path = folder / f"{name}.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    return f"{lines('effects')} effects of {plan.count} intents, {lines('answers')} callers answered"


# -- the command line ---------------------------------------------------------------------------------------
def parse(words: list[str] | None = None) -> tuple[Options, bool]:
    """Return the options, and whether to keep all files."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="how long calls and faults continue [3]")
    parser.add_argument("--hours", type=float, help="the same in hours")
    parser.add_argument("--seed", type=int, help="seed of everything random [a new one, printed]")
    parser.add_argument("--intents", type=int, help=f"number of intents [{PER_MINUTE} a minute]")
    parser.add_argument("--brokers", default=",".join(BROKERS), help="brokers to use [all]: %(default)s")
    parser.add_argument(
        "--only", default=",".join(FAULTS), help='kinds of fault [all], or "none": %(default)s'
    )
    parser.add_argument(
        "--report", type=Path, default=Path("build/chaos"), help="folder of the report [%(default)s]"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep all logs and ledgers; after a failure they are always kept"
    )
    parser.add_argument(
        "--app", default=Options.app, help="application of the workers; tests.chaos.unguarded:app must fail"
    )
    given = parser.parse_args(words)
    seconds = 3600 * given.hours if given.hours else 60 * given.minutes
    brokers = tuple(given.brokers.split(","))
    kinds = () if given.only == "none" else tuple(given.only.split(","))
    for names, known in ((brokers, BROKERS), (kinds, tuple(FAULTS))):
        unknown = set(names) - set(known)
        if unknown:
            parser.error(f"there is no {unknown.pop()!r}; there are: {', '.join(known)}")
    if seconds <= 0 or (given.intents is not None and given.intents < 1):
        parser.error("a run needs more than 0 seconds and at least one intent")
    plan = Plan(
        seed=given.seed if given.seed is not None else random.SystemRandom().randrange(1_000_000),
        seconds=seconds,
        count=given.intents or max(1, round(PER_MINUTE * seconds / 60)),
        brokers=tuple(broker for broker in BROKERS if broker in brokers),
        kinds=tuple(kind for kind in FAULTS if kind in kinds),
    )
    folder = Path(tempfile.mkdtemp(prefix="idem-chaos-"))
    return Options(plan, folder, given.report, given.app), given.keep


def main(words: list[str] | None = None) -> int:
    options, keep = parse(words)
    # A shell lets background programs ignore SIGINT, so its handler is set too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    status = 1
    try:
        with report.Screen() as screen:
            screen.say(f"seed {options.plan.seed}; to run the same plan: {options.replay}")
            try:
                outcome = run(options, screen.now)
            except ServerMissingError as error:
                screen.say(str(error))
                return 2
            screen.tell(outcome)
            if options.report is not None:
                screen.say(f"report with a picture: {report.write(outcome, options.report)}")
            status = 0 if outcome.verdict.kept else 1
    except KeyboardInterrupt:
        print(f"interrupted: all processes of the run are stopped ({os.getpid()})")
        status = 130
    finally:
        if status == 1 or keep:
            print(f"logs and ledgers: {options.folder}")
        else:
            shutil.rmtree(options.folder, ignore_errors=True)
    return status
