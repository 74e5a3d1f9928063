"""Draws everything random of a run from its seed before anything starts.

An intent depends on the seed and its number only, a fault on the seed, its kind and its broker. So a run with fewer
intents or fewer kinds of fault has a part of the large run's intents and faults.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

BROKERS = ("redis", "rabbitmq")

# What a crash means for a task, and the percentage of intents that have it. See `shop` for the bodies.
POLICIES = {"reconcile": 35, "in_doubt": 25, "resume": 15, "rerun": 15, "retry": 10}

# When Celery acknowledges a message: before the body or after it.
ACKS = ("early", "late")

# Ways to call (see `doors`) and their weights. MCP and HTTP cost more CPU than the others.
DOORS = {
    "delay": 20,
    "send_task": 15,
    "submit": 20,
    "submit_by_name": 10,
    "chain": 10,
    "tool": 10,
    "http": 10,
    "mcp": 5,
}

# Doors that can carry a caller's key.
KEYED_DOORS = ("delay", "send_task", "submit", "submit_by_name", "http")

# Every kind of fault, and the mean seconds between two of a kind at one target. A killed worker needs some seconds to
# start again. With more frequent faults there would be no worker left to break.
FAULTS = {
    "kill child": 5.0,
    "freeze child": 10.0,
    "kill worker": 45.0,
    "freeze worker": 40.0,
    "kill store": 40.0,
    "freeze store": 30.0,
    "cut broker": 20.0,
    "kill host": 60.0,
    "empty broker": 30.0,
}

# Seconds that a frozen process sleeps: from less than its lease to more than twice the lease (see `shop.LEASE`).
FROZEN = (1.0, 5.0)
# What happens to an intent's first execution at a chosen point, in percent. A fault at a random time seldom hits the
# moment before an effect. FATE_OF names the kind of fault to which each belongs.
FATES = {"": 91, "killed before": 3, "killed after": 3, "frozen before": 2, "frozen after": 1}
FATE_OF = {"killed": "kill child", "frozen": "freeze child"}
# Seconds that such an execution is frozen: always longer than its lease.
ASLEEP = (2.5, 5.0)

# Seconds that a frozen store sleeps: around its clients' timeout, so that some replies come and some are lost.
STORE_FROZEN = (0.3, 2.0)
# Seconds that a killed store stays down.
STORE_AWAY = (0.1, 2.5)

# The longest time of each of the three parts of a body, in seconds: faults can hit it, and two cores can run it.
LONGEST = 0.06

# The longest time between an intent's first call and its last, in seconds. Some come while the first runs, some later.
SPREAD = 8.0


@dataclass(frozen=True)
class Call:
    """One agent's call: when, through which door, and how long the agent waits before it calls again."""

    at: float
    door: str
    broker: str
    patience: float


@dataclass(frozen=True)
class Intent:
    """One action that is meant to happen once, and how its body and its destination behave.

    `before`, `during` and `after` are seconds: in the body before its request, at the destination, and in the body
    after the reply. `busy` is how often the destination first says "not now". `fate` is what happens to the first
    execution, and where (see FATES). `asleep` is for how many seconds it is frozen.
    """

    number: int
    policy: str
    acks: str
    cents: int
    key: str
    before: float
    during: float
    after: float
    busy: int
    declined: bool
    fate: str
    asleep: float
    calls: tuple[Call, ...]

    @property
    def ref(self) -> str:
        """The intent's name in the shop."""
        return f"i{self.number:06}"

    @property
    def task(self) -> str:
        return f"chaos.{self.policy}.{self.acks}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its effects."""
        if self.declined:
            return ()
        return ("charge", "mail") if self.policy == "resume" else ("charge",)


@dataclass(frozen=True)
class Fault:
    """One fault. `broker` names the worker or the connections; `child` selects one of the worker's processes."""

    at: float
    kind: str
    broker: str
    child: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The plan of a run. `seconds` is how long calls and faults continue; `kinds` are its kinds of fault."""

    seed: int
    seconds: float
    count: int
    brokers: tuple[str, ...] = BROKERS
    kinds: tuple[str, ...] = tuple(FAULTS)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        values = json.loads(text)
        return cls(**{**values, "brokers": tuple(values["brokers"]), "kinds": tuple(values["kinds"])})

    def intent(self, number: int) -> Intent:
        """Return the intent with this number. It is the same in every process."""
        random = Random(f"{self.seed} intent {number}")
        policy = _one_of(random, POLICIES)
        keyed = random.random() < 0.1
        begins = random.random() * self.seconds
        doors = {name: weight for name, weight in DOORS.items() if not keyed or name in KEYED_DOORS}
        fate = _one_of(random, FATES)
        calls = []
        # While one execution is frozen, another call has to come, to take over or to ask.
        for n in range(random.randint(2 if fate.startswith("frozen") else 1, 5)):
            later = random.random() * SPREAD if n else 0.0
            broker = BROKERS[random.randrange(2)]
            door = _one_of(random, doors)
            patience = random.uniform(1.5, 8.0)
            if broker not in self.brokers:
                broker = self.brokers[0]
            calls.append(Call(begins + later, door, broker, patience))
        return Intent(
            number=number,
            policy=policy,
            acks=random.choice(ACKS),
            cents=random.randint(1, 100_000),
            key=f"caller-{self.seed}-{number}" if keyed else "",
            before=random.uniform(0, LONGEST),
            during=random.uniform(0, LONGEST),
            after=random.uniform(0, LONGEST),
            busy=random.choice((0, 0, 0, 0, 0, 0, 1, 2)) if policy != "retry" else random.randint(1, 2),
            declined=random.random() < 0.03,
            fate=fate if FATE_OF.get(fate.partition(" ")[0], "") in self.kinds else "",
            asleep=random.uniform(*ASLEEP),
            calls=tuple(calls),
        )

    def intents(self) -> list[Intent]:
        return [self.intent(number) for number in range(self.count)]

    def faults(self) -> list[Fault]:
        """Return all faults in order of time. They are spread out, so that a short run has each kind too."""
        found = []
        for kind in self.kinds:
            for broker in ("",) if kind.endswith(("store", "host")) else self.brokers:
                random = Random(f"{self.seed} {kind} {broker}")
                count = max(1, round(self.seconds / FAULTS[kind]))
                for n in range(count):
                    at = (n + random.uniform(0.1, 0.9)) * self.seconds / count
                    found.append(Fault(at, kind, broker, random.randrange(64), _lasting(random, kind)))
        return sorted(found, key=lambda fault: fault.at)


def _lasting(random: Random, kind: str) -> float:
    """Return how many seconds a fault lasts, or 0.0 if it has no duration."""
    lasting = {"freeze store": STORE_FROZEN, "kill store": STORE_AWAY}
    if kind.startswith("freeze") or kind in lasting:
        return random.uniform(*lasting.get(kind, FROZEN))
    return 0.0


def _one_of(random: Random, weights: dict[str, Any]) -> str:
    return random.choices(list(weights), list(weights.values()))[0]
