"""Depth-first search through everything that may happen in a scenario, with as few runs as possible.

Greenlets cannot be copied, so the whole world is run again to try another choice. To save runs, a choice is not run if
its result is known. The result is known if the choice was run in another state that differs only in what the choice
did not use: in actors that are not near the chosen one, and in shared attributes that it did not read or write. A run
that later reaches a state found in this way checks that it really is that state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.proof.explorer import BUDGET, LEFT, Scenario, Violation, World, modelled
from tests.proof.standing import Choice, Outlook, Part, Standing


@dataclass
class Coverage:
    """The result of exploring one scenario.

    Attributes:
        schedules: number of different states without further choices. Each was then run to its end.
        cut: choices that led to a known state, whose futures are explored already.
        states: number of different states.
        runs: runs of the world from its beginning.
        steps: choices made in these runs.
        violation: the broken invariant, or "".
        trace: the choices that led to the violation.
    """

    schedules: int = 0
    cut: int = 0
    states: int = 0
    runs: int = 0
    steps: int = 0
    violation: str = ""
    trace: tuple[str, ...] = ()


class Move(NamedTuple):
    """How a choice changed a state.

    Attributes:
        gone: the parts of actors that the choice removed or replaced.
        come: the parts that it added.
        shared: the new values of the shared attributes that the choice used.
        clock: both clocks afterwards.
    """

    gone: frozenset[Part]
    come: frozenset[Part]
    shared: tuple[Any, ...]
    clock: tuple[int, int]


class Fork:
    """A state and its choices."""

    def __init__(self, scenario: Scenario, standing: Standing) -> None:
        self.standing = standing
        held, left, ghosts, lock = (standing.shared[place] for place in (0, *LEFT))
        actors = sorted(standing.actors, key=_name)
        outlook = Outlook(scenario, actors, held, standing[2:], lock)
        self.choices = outlook.choices(dict(zip(BUDGET, left, strict=True)), ghosts)
        self.taken = -1

    @property
    def choice(self) -> Choice:
        return self.choices[self.taken]

    def near(self) -> frozenset[Part]:
        name, _ = self.choice
        return frozenset() if name is None else self.standing.near(name)


def _name(actor: Part) -> str:
    return str(actor.name)  # names are unique, but their parts have different types


class Search:
    """The search through all schedules of one scenario."""

    def __init__(self, scenario: Scenario, at_most: int) -> None:
        self.scenario = scenario
        self.at_most = at_most
        self.coverage = Coverage()
        self.effects = False
        self._known: set[Standing] = set()
        self._moves: dict[Any, dict[tuple[int, ...], dict[tuple[Any, ...], Move]]] = {}
        self._path: list[Fork] = []
        self._world: World | None = None
        self._trail: list[tuple[Fork, int]] = []  # the choices that the world has made

    def run(self) -> None:
        with modelled() as self._enter:
            try:
                self._arrive(self._begin().state())
                while self._path:
                    fork = self._path[-1]
                    fork.taken += 1
                    if fork.taken < len(fork.choices):
                        self._arrive(self._foreseen(fork) or self._try(fork))
                    else:
                        self._path.pop()
            except Violation as violation:
                assert self._world is not None
                self.coverage.violation = str(violation)
                self.coverage.trace = tuple(" ".join(map(str, step)) for step in self._world.trace)
            finally:
                self._end()
                self.coverage.states = len(self._known)

    def _arrive(self, standing: Standing) -> None:
        if standing in self._known:
            self.coverage.cut += 1
            return
        self._known.add(standing)
        fork = Fork(self.scenario, standing)
        if fork.choices:
            self._path.append(fork)
            return
        self.coverage.schedules += 1
        world = self._world_at(len(self._path), standing)
        world.close()
        self.effects = self.effects or bool(world.effects)
        self._end()

    def _foreseen(self, fork: Fork) -> Standing | None:
        """Return the state after the choice, if it is known."""
        before = fork.standing
        for used, moves in self._moves.get((fork.choice, fork.near(), before[2:]), {}).items():
            move = moves.get(tuple([before.shared[place] for place in used]))
            if move is not None:
                shared = list(before.shared)
                for place, value in zip(used, move.shared, strict=True):
                    shared[place] = value
                return Standing(before.actors - move.gone | move.come, tuple(shared), *move.clock)
        return None

    def _try(self, fork: Fork) -> Standing:
        """Run the choice and return the state after it."""
        before, near = fork.standing, fork.near()
        world = self._world_at(len(self._path) - 1, before)
        self._trail.append((fork, fork.taken))
        world.do(world.named(fork.choice))
        after = world.state()
        gone = before.actors - after.actors
        if gone <= near and not world.looked:
            used = tuple([place for place in range(len(before.shared)) if world.used >> place & 1])
            come = after.actors - before.actors
            move = Move(gone, come, tuple([after.shared[place] for place in used]), after[2:])
            moves = self._moves.setdefault((fork.choice, near, before[2:]), {})
            moves.setdefault(used, {})[tuple([before.shared[place] for place in used])] = move
        return after

    def _world_at(self, depth: int, standing: Standing) -> World:
        """Return a world that has made the choices of the path down to this depth."""
        way = [(fork, fork.taken) for fork in self._path[:depth]]
        world, gone = self._world, len(self._trail)
        if world is None or self._trail != way[:gone]:
            self._end()
            world, gone = self._begin(), 0
        if gone < depth:
            world.replaying = True
            for fork, taken in way[gone:]:
                world.do(world.named(fork.choices[taken]))
            world.replaying = False
            self._trail = way
            assert world.state() == standing, "what was foreseen does not come to be"
        return world

    def _begin(self) -> World:
        self._world = world = World(self.scenario)
        self._trail = []
        self._enter(world)
        self.coverage.runs += 1
        if self.coverage.runs > self.at_most:
            raise AssertionError(f"{self.scenario.name}: more than {self.at_most} runs")
        world.start_new()
        return world

    def _end(self) -> None:
        if self._world is not None:
            self.coverage.steps += self._world.steps
            self._world.bury()
            self._world = None


def explore(scenario: Scenario, at_most: int = 10_000_000) -> Coverage:
    """Explore every schedule of a scenario, or stop at the first that breaks an invariant.

    Args:
        at_most: highest number of runs. More are an error: the scenario is too large to be explored completely.
    """
    search = Search(scenario, at_most)
    search.run()
    if not search.coverage.violation:
        assert search.effects, "no body ever had an effect: the model is broken, and proves nothing"
    return search.coverage
