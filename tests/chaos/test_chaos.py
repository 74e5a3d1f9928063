"""A short soak, and tests of the soak itself: of its plan, of its verdict, and that it fails without the guard."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.chaos import soak
from tests.chaos.count import KINDS, Verdict, judge
from tests.chaos.plan import DOORS, FAULTS, Plan
from tests.chaos.report import Run
from tests.chaos.shop import answer
from tests.conftest import missing
from tests.support import forks
from tests.support.servers import ServerMissingError
from tests.support.waiting import wait_for
from tests.support.workers import ROOT


# -- the plan -----------------------------------------------------------------------------------------------
def test_a_seed_is_a_plan() -> None:
    plan = Plan(seed=7, seconds=60, count=500)
    assert plan.intents() == Plan.from_json(plan.to_json()).intents()
    assert plan.faults() == Plan.from_json(plan.to_json()).faults()
    assert plan.intents() != dataclasses.replace(plan, seed=8).intents()


def test_a_smaller_plan_is_a_part_of_the_larger() -> None:
    plan = Plan(seed=7, seconds=60, count=500)
    assert dataclasses.replace(plan, count=20).intents() == plan.intents()[:20]
    fewer = dataclasses.replace(plan, kinds=("kill child", "kill store"))
    assert fewer.faults() == [fault for fault in plan.faults() if fault.kind in fewer.kinds]


def test_a_short_plan_has_everything() -> None:
    plan = Plan(seed=7, seconds=12, count=300)
    assert {fault.kind for fault in plan.faults()} == set(FAULTS)
    assert {call.door for intent in plan.intents() for call in intent.calls} == set(DOORS)
    assert {len(intent.calls) for intent in plan.intents()} == {1, 2, 3, 4, 5}


# -- the judge ----------------------------------------------------------------------------------------------
PLAN = Plan(seed=7, seconds=60, count=80)
Line = dict[str, Any]


class Case:
    """A run without violations. The tests change one thing in it."""

    def __init__(self) -> None:
        self.intents = PLAN.intents()
        self.effects: list[Line] = []
        self.answers: list[Line] = []
        self.states: dict[str, str] = {}
        for intent in self.intents:
            receipts = {part: len(self.effects) + n for n, part in enumerate(intent.parts)}
            self.effects += [{"intent": intent.ref, "part": p, "receipt": n} for p, n in receipts.items()]
            self.states[intent.ref] = "failed" if intent.declined else "succeeded"
            told = "declined" if intent.declined else "value"
            value = None if intent.declined else answer(intent.ref, intent.cents, receipts)
            self.answers += [
                {"intent": intent.ref, "call": n, "told": told, "value": value, "tries": [{"detail": ""}]}
                for n in range(len(intent.calls))
            ]

    def judge(self) -> Verdict:
        return judge(self.intents, self.effects, self.answers, self.states)


@pytest.fixture
def case() -> Case:
    return Case()


def test_a_good_run(case: Case) -> None:
    assert any(intent.declined for intent in case.intents)
    assert case.judge().violations == []


def twice(case: Case) -> None:
    case.effects.append({**case.effects[0], "receipt": 1_000})


def never(case: Case) -> None:
    del case.effects[0]


def a_declined_one(case: Case) -> None:
    declined = next(intent for intent in case.intents if intent.declined)
    case.effects.append({"intent": declined.ref, "part": "charge", "receipt": 1_000})


def an_unknown_one(case: Case) -> None:
    case.effects.append({"intent": "i999999", "part": "charge", "receipt": 1_000})


def a_tick_twice(case: Case) -> None:
    case.effects += [{"intent": "chaos.tick:1", "part": "tick", "receipt": n} for n in (1_000, 1_001)]


def no_record(case: Case) -> None:
    del case.states[case.intents[0].ref]


def in_doubt(case: Case) -> None:
    case.states[case.intents[0].ref] = "in_doubt"


def another_receipt(case: Case) -> None:
    first = case.answers[0]
    first["value"] = {**first["value"], "receipts": {"charge": 1_000}}


def an_error(case: Case) -> None:
    case.answers[0].update(told="wrong", tries=[{"detail": "ResultUnavailable"}])


def a_no(case: Case) -> None:
    case.answers[0]["told"] = "declined"


def silence(case: Case) -> None:
    case.answers[0]["told"] = "again"


def still_in_doubt(case: Case) -> None:
    case.answers[0]["told"] = "in doubt"


def a_caller_that_died(case: Case) -> None:
    del case.answers[0]


SPOILT: dict[Callable[[Case], None], str] = {
    twice: "double",
    a_tick_twice: "double",
    never: "lost",
    a_declined_one: "not meant",
    an_unknown_one: "not meant",
    no_record: "unsettled",
    in_doubt: "unsettled",
    another_receipt: "wrong answer",
    an_error: "wrong answer",
    a_no: "wrong answer",
    silence: "no answer",
    still_in_doubt: "no answer",
    a_caller_that_died: "no answer",
}


@pytest.mark.parametrize(
    ("spoil", "kind"), SPOILT.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_the_judge_notices(case: Case, spoil: Callable[[Case], None], kind: str) -> None:
    assert not case.intents[0].declined
    assert kind in KINDS
    spoil(case)
    assert kind in {violation.kind for violation in case.judge().violations}


def test_the_last_answer_counts(case: Case) -> None:
    """A caller that received "in doubt" calls again after the decision, and only the last answer counts."""
    case.answers.insert(0, {**case.answers[0], "told": "in doubt"})
    assert case.judge().violations == []


# -- real runs ----------------------------------------------------------------------------------------------
def soaked(options: soak.Options) -> Run:
    try:
        return soak.run(options, lambda line: None)
    except ServerMissingError as error:
        missing(str(error))


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.rabbitmq
@pytest.mark.timeout(600)  # it takes about 35 s, and longer on a busy machine
def test_a_short_soak(tmp_path: Path) -> None:
    plan = Plan(seed=26, seconds=10, count=80)
    run = soaked(soak.Options(plan, tmp_path))
    assert run.verdict.violations == [], (soak.Options(plan, tmp_path).replay, run.stories)
    # The faults were brought about.
    assert all(run.faults_of(kind) for kind in ("kill store", "freeze store", "cut broker", "empty broker"))
    # One of these two may find that the other has killed its worker.
    assert run.faults_of("kill host") + run.faults_of("kill worker") > 0
    assert run.verdict.ticks > 5
    assert run.verdict.calls < run.verdict.messages


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(300)
def test_without_the_guard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A soak of workers without the claim must fail and must say what happened."""
    words = [
        "--seed",
        "20",
        "--minutes",
        "0.08",
        "--intents",
        "40",
        "--brokers",
        "redis",
        "--only",
        "kill child",
    ]
    status = soak.main([*words, "--app", "tests.chaos.unguarded:app", "--report", str(tmp_path)])
    told = capsys.readouterr().out
    assert status == 1, told
    assert re.search(r"charge \d+ times", told), told
    assert "The story of i0" in told
    assert "--only 'kill child' --app tests.chaos.unguarded:app" in told
    assert "NOT kept" in (tmp_path / "chaos.html").read_text()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A soak in a separate process, with all its files below `tmp_path`."""
    words = [sys.executable, "-m", "tests.chaos", "--minutes", "1", "--brokers", "redis"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        # Not forked by the tests' fork server, because `family` reads the environment.
        env={**os.environ, "TMPDIR": str(tmp_path), forks.ADDRESS: ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    yield process
    if process.poll() is None:
        process.kill()
    for left in family(tmp_path):
        left.kill()
    process.communicate()


def family(folder: Path) -> list[psutil.Process]:
    """Return the processes that have the folder in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            told = [*process.cmdline(), *process.environ().values()]
        except psutil.Error:
            continue
        if process.pid != os.getpid() and any(str(folder) in word for word in told):
            found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(200)
def test_a_signal_leaves_nothing(started: subprocess.Popen[str], tmp_path: Path) -> None:
    """SIGTERM ends all processes of a soak. Ctrl-C has the same handler."""

    wait_for(lambda: [*tmp_path.rglob("agents-*.log")], 90, "agents", every=0.2)
    assert len(family(tmp_path)) > 8
    started.send_signal(signal.SIGTERM)
    assert started.wait(60) == 130
    wait_for(lambda: not family(tmp_path), 10, lambda: f"the end of {family(tmp_path)}")
