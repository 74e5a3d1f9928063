"""The verdict on a run, from the destination's ledger. It is a pure function, so that it can be tested."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.plan import Intent
from tests.chaos.shop import answer

TICK = "chaos.tick:"


@dataclass(frozen=True)
class Violation:
    """One broken promise. `kind` is one of KINDS, `ref` is the intent."""

    kind: str
    ref: str
    what: str


KINDS = {
    "double": "effects that happened twice",
    "lost": "intents that did not happen",
    "not meant": "effects that were not meant",
    "unsettled": "intents without an outcome",
    "wrong answer": "callers with a wrong answer",
    "no answer": "callers without an answer",
}


@dataclass
class Verdict:
    """The result of a run."""

    intents: int = 0
    calls: int = 0
    messages: int = 0
    effects: int = 0
    per_intent: Counter[int] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)
    ticks: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return not self.violations

    def of(self, kind: str) -> int:
        return sum(violation.kind == kind for violation in self.violations)


def judge(
    intents: Iterable[Intent],
    effects: Iterable[Mapping[str, Any]],
    answers: Iterable[Mapping[str, Any]],
    states: Mapping[str, str],
) -> Verdict:
    """Compare what was meant with what happened.

    Args:
        effects: the destination's ledger. `intent` is the reference, `part` names one of its effects.
        answers: what callers received. The last one of each caller counts.
        states: the states of the records, by reference. An intent without a record is "absent".
    """
    verdict = Verdict()
    done: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for effect in effects:
        done[str(effect["intent"])][str(effect["part"])].append(int(effect["receipt"]))
        verdict.effects += 1
    last: dict[tuple[str, int], Mapping[str, Any]] = {}
    for one in answers:
        last[str(one["intent"]), int(one["call"])] = one
        verdict.messages += len(one["tries"])
    for intent in intents:
        verdict.intents += 1
        parts = done.pop(intent.ref, {})
        verdict.per_intent[max((len(receipts) for receipts in parts.values()), default=0)] += 1
        verdict.violations += _effects(intent, parts)
        state = states.get(intent.ref, "absent")
        if state != ("failed" if intent.declined else "succeeded"):
            verdict.violations.append(Violation("unsettled", intent.ref, f"its record is {state}"))
        right = answer(intent.ref, intent.cents, {part: receipts[0] for part, receipts in parts.items()})
        for place in range(len(intent.calls)):
            verdict.calls += 1
            verdict.violations += _answer(intent, place, last.get((intent.ref, place)), right, verdict.told)
    for ref, parts in done.items():  # effects that are not in the plan; ticks of the beats are allowed
        verdict.ticks += ref.startswith(TICK)
        for part, receipts in parts.items():
            if not ref.startswith(TICK):
                verdict.violations.append(Violation("not meant", ref, f"{part}: receipts {receipts}"))
            elif len(receipts) > 1:
                verdict.violations.append(Violation("double", ref, f"{part} {len(receipts)} times"))
    return verdict


def _effects(intent: Intent, parts: Mapping[str, list[int]]) -> list[Violation]:
    found = []
    for part, receipts in parts.items():
        if part not in intent.parts:
            found.append(Violation("not meant", intent.ref, f"{part}: receipts {receipts}"))
        elif len(receipts) > 1:
            found.append(
                Violation("double", intent.ref, f"{part} {len(receipts)} times: receipts {receipts}")
            )
    missing = [part for part in intent.parts if part not in parts]
    if missing:
        found.append(Violation("lost", intent.ref, f"no {' and no '.join(missing)}"))
    return found


def _answer(
    intent: Intent, place: int, one: Mapping[str, Any] | None, right: Mapping[str, Any], told: Counter[str]
) -> list[Violation]:
    call = intent.calls[place]
    who = f"caller {place + 1} by {call.door} on {call.broker}"
    if one is None:
        return [Violation("no answer", intent.ref, f"{who} is still waiting")]
    kind = str(one["told"])
    told[kind] += 1
    if kind in ("again", "in doubt"):
        return [Violation("no answer", intent.ref, f"{who}: {kind}, {one['tries'][-1]['detail']}")]
    if kind == ("declined" if intent.declined else "value") and (intent.declined or one["value"] == right):
        return []
    what = one["value"] if kind == "value" else f"{kind}: {one['tries'][-1]['detail']}"
    return [Violation("wrong answer", intent.ref, f"{who} was told {what}, not {right}")]
