"""Random signatures, decorators and models: `python -m tests.proof.identity --seed 1 --count 500`.

Each task is called in several spellings: by position, by name or by default; with a dictionary, with its entries in
another order, or with the model itself. The meaning of a call is what the body received, or how the model was built.
It does not come from the code under test. Calls with the same meaning must have the same key, and calls with
different meanings different keys. The program prints all keys, so that two processes can be compared.
"""

from __future__ import annotations

import argparse
import datetime as dt
import functools
import inspect
import random
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple, Optional

import pydantic
from celery import Celery
from pydantic import BaseModel, Field, SecretStr

from celery_idem import ALL_ARGUMENTS, IdempotentTask
from tests.support.decorators import passing, traced, with_named_session, with_session

UTC = dt.timezone.utc
BERLIN = dt.timezone(dt.timedelta(hours=2))


class Sorted(NamedTuple):
    """The keys of the calls of one task, by the meaning of the call."""

    keys: dict[str, set[str]]

    def add(self, meaning: Any, key: str) -> None:
        self.keys.setdefault(repr(meaning), set()).add(key)

    def check(self, what: str) -> None:
        for meaning, keys in self.keys.items():
            assert len(keys) == 1, f"{what}: one action, {len(keys)} keys: {meaning}"
        every = [key for keys in self.keys.values() for key in keys]
        assert len(set(every)) == len(every), f"{what}: two actions, one key: {self.keys}"


def declared(app: Celery, fun: Any, **options: Any) -> Any:
    name = f"t{len(app._tasks)}"
    return app.task(base=IdempotentTask, name=name, shared=False, lazy=False, **options)(fun)


# --- signatures -----------------------------------------------------------------------------


def taking_one(fn: Any) -> Any:
    @functools.wraps(fn)
    def wrapper(tenant: Any = 0, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return wrapper


VALUES: list[list[Callable[[], Any]]] = [  # each row is one value in several spellings
    [lambda: 1, lambda: 1.0, lambda: Decimal("1.00")],
    [lambda: 2, lambda: Decimal(2)],
    [lambda: "1"],
    [lambda: True],
    [lambda: None],
    [lambda: ["a", 1], lambda: ("a", 1.0)],
    [lambda: {"a", "b", "c"}, lambda: {"c", "b", "a"}],
    [lambda: {"x": 1, "y": 2}, lambda: {"y": 2, "x": 1}],
    [lambda: dt.datetime(2026, 1, 1, 12, tzinfo=UTC), lambda: dt.datetime(2026, 1, 1, 14, tzinfo=BERLIN)],
    [lambda: uuid.UUID(int=7)],
    [lambda: dt.date(2026, 1, 1)],
]


def a_signature(rng: random.Random, app: Celery) -> tuple[str, Sorted, str]:
    """Make a task with a random signature and decorators, and compute the keys of its calls."""
    count = rng.randint(1, 4)
    kinds = sorted(
        rng.choice(
            (
                inspect.Parameter.POSITIONAL_ONLY,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                inspect.Parameter.KEYWORD_ONLY,
            )
        )
        for _ in range(count)
    )
    decorators = [rng.choice((passing, traced)) for _ in range(rng.randint(0, 3))]
    session = rng.choice((None, None, with_session, with_named_session))
    tenant = rng.random() < 0.2
    if tenant:  # else a parameter with a default would precede parameters without one
        kinds = [
            k if k is inspect.Parameter.KEYWORD_ONLY else inspect.Parameter.POSITIONAL_ONLY for k in kinds
        ]
    defaults: dict[str, int] = {}
    pieces: list[str] = ["session"] if session is with_session else []
    names = [f"p{n}" for n in range(count)]
    optional = tenant
    for n, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        if kind is inspect.Parameter.KEYWORD_ONLY and kinds.index(kind) == n:
            if pieces and kinds[n - 1 : n] == [inspect.Parameter.POSITIONAL_ONLY]:
                pieces.append("/")
            pieces.append("*")
        elif n and kinds[n - 1] is inspect.Parameter.POSITIONAL_ONLY and kind is not kinds[n - 1]:
            pieces.append("/")
        has_default = rng.random() < 0.4 or (optional and kind is not inspect.Parameter.KEYWORD_ONLY)
        optional = optional or (has_default and kind is not inspect.Parameter.KEYWORD_ONLY)
        if has_default:
            defaults[name] = rng.randrange(len(VALUES))
        pieces.append(f"{name}=VALUES[{defaults[name]}][0]()" if has_default else name)
    if kinds and kinds[-1] is inspect.Parameter.POSITIONAL_ONLY:
        pieces.append("/")
    if session is with_named_session:
        pieces += [*(["*"] if "*" not in pieces else []), "session"]
    space: dict[str, Any] = {"VALUES": VALUES}
    got = ", ".join(f"'{name}': {name}" for name in names)
    exec(f"def body({', '.join(pieces)}): return {{{got}}}", space)  # noqa: S102
    fun: Any = space["body"]
    if session is not None:
        fun = session(fun)
    if tenant:
        fun = taking_one(fun)
    for decorate in decorators:
        fun = decorate(fun)
    intent = tuple(rng.sample(names, rng.randint(1, count)))
    task = declared(app, fun, intent=intent)
    calls = Sorted({})
    for _ in range(4):
        action = {name: rng.randrange(len(VALUES)) for name in names}
        variants = [action]
        variants += [{**action, name: rng.randrange(len(VALUES))} for name in names]  # one parameter differs
        for variant in variants:
            for _ in range(2):
                args, kwargs = _spelt(rng, variant, names, kinds, defaults, tenant, traced in decorators)
                body = task.run(*args, **kwargs)
                meaning = [(name, _which(body[name])) for name in sorted(intent)]
                assert meaning == [(name, variant[name]) for name in sorted(intent)], "the generator is wrong"
                calls.add(meaning, task.intent_key(*args, **kwargs))
    return (
        "signature",
        calls,
        f"def body({', '.join(pieces)}) in {[d.__name__ for d in decorators]}, {session}",
    )


def _spelt(
    rng: random.Random,
    action: dict[str, int],
    names: list[str],
    kinds: list[Any],
    defaults: dict[str, int],
    tenant: bool,
    trace: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: list[Any] = [rng.randrange(3)] if tenant else []
    kwargs: dict[str, Any] = {}
    positional = True
    for name, kind in zip(names, kinds, strict=True):
        value = rng.choice(VALUES[action[name]])()
        left_out = defaults.get(name) == action[name] and rng.random() < 0.6
        if kind is inspect.Parameter.KEYWORD_ONLY:
            if not left_out:
                kwargs[name] = value
            continue
        later = [
            n
            for n, k in zip(names, kinds, strict=True)
            if n > name and k is inspect.Parameter.POSITIONAL_ONLY and defaults.get(n) != action[n]
        ]
        if left_out and not later:
            positional = False
        elif positional and (kind is inspect.Parameter.POSITIONAL_ONLY or rng.random() < 0.5 or later):
            args.append(value)
        elif kind is inspect.Parameter.POSITIONAL_ONLY:
            continue  # an earlier one was left out, so this one is left out too; it has its default
        else:
            positional = False
            kwargs[name] = value
    if trace and rng.random() < 0.5:
        kwargs["trace"] = rng.random()
    items = list(kwargs.items())
    rng.shuffle(items)
    return tuple(args), dict(items)


def _which(value: Any) -> int:
    for number, row in enumerate(VALUES):
        for spelling in row:
            made = spelling()
            if made == value and isinstance(made, bool) is isinstance(value, bool):
                return number
    raise AssertionError(value)


# --- models -----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The type of a field, and values for it, each in several valid spellings."""

    hint: Any
    values: list[list[Any]]


class Leaf(BaseModel):
    sku: str
    count: int = 1
    minted: uuid.UUID = Field(default_factory=uuid.uuid4)


class Dog(BaseModel):
    kind: str = "dog"
    bark: int


class Cat(BaseModel):
    kind: str = "cat"
    meow: int


KINDS = [
    Kind(int, [[1, "1", 1.0], [2, "2"], [0]]),
    Kind(str, [["a"], ["b"], [""]]),
    Kind(bool, [[True], [False, "false"]]),
    Kind(Decimal, [["1.50", "1.5", Decimal("1.500")], ["1.51"], [0, "0.00"]]),
    Kind(int | None, [[None], [1, "1"], [2]]),
    Kind(
        dt.datetime,
        [
            ["2026-01-01T12:00:00Z", "2026-01-01T14:00:00+02:00", dt.datetime(2026, 1, 1, 12, tzinfo=UTC)],
            ["2026-01-01T12:00:01Z"],
        ],
    ),
    Kind(set[str], [[["a", "b", "c"], {"c", "a", "b"}, ["b", "c", "a", "a"]], [["a"]], [[]]]),
    Kind(frozenset[int], [[[1, 2, 3], [3, 2, 1]], [[1]]]),
    Kind(SecretStr, [["hunter2", SecretStr("hunter2")], ["hunter3"], [""]]),
    Kind(dict[str, int], [[{"a": 1, "b": 2}, {"b": "2", "a": 1}], [{"a": 2, "b": 1}], [{}]]),
    Kind(int | str, [[1], ["1"], ["x"]]),
    Kind(Leaf, [[{"sku": "a"}, {"count": 1, "sku": "a"}, {"sku": "a", "count": "1"}], [{"sku": "b"}]]),
    Kind(Leaf | None, [[None], [{"sku": "a"}, {"sku": "a", "count": 1}], [{"sku": "a", "count": 2}]]),
    Kind(list[Leaf], [[[]], [[{"sku": "a"}], ({"sku": "a", "count": 1},)], [[{"sku": "a"}, {"sku": "b"}]]]),
    Kind(dict[str, Leaf], [[{}], [{"x": {"sku": "a"}}], [{"y": {"sku": "a"}}]]),
    Kind(
        Dog | Cat,
        [[{"bark": 1}, {"kind": "dog", "bark": 1}, Dog(bark=1)], [{"meow": 1}, Cat(meow=1)], [{"meow": 2}]],
    ),
    Kind(uuid.UUID, [["00000000-0000-0000-0000-000000000007", uuid.UUID(int=7)], [uuid.UUID(int=8)]]),
]

UNSENT = "not sent"


def a_model(rng: random.Random, app: Celery) -> tuple[str, Sorted, str]:
    """Make a task with a random model, and compute the keys of its calls."""
    kinds: dict[str, Kind] = {}
    fields: dict[str, Any] = {}
    minting = set()
    for n in range(rng.randint(1, 4)):
        name, kind = f"f{n}", rng.choice(KINDS)
        options: dict[str, Any] = {}
        if rng.random() < 0.3:
            options["exclude"] = True
        if rng.random() < 0.3:
            options["alias"] = f"alias-{name}"
        how = rng.random()
        if how < 0.3:
            options["default"] = pydantic.TypeAdapter(kind.hint).validate_python(kind.values[0][0])
        elif how < 0.5:
            minting.add(name)
            options["default_factory"] = functools.partial(lambda values: values[-1][0], kind.values)
        fields[name] = (kind.hint, Field(**options))
        kinds[name] = kind
    config = pydantic.ConfigDict(populate_by_name=True, extra=rng.choice(("allow", "ignore")))
    model = pydantic.create_model("Model", __config__=config, **fields)

    def place(before: int, order: Any = None, *, note: str = "") -> None: ...

    place.__annotations__ = {"order": rng.choice((model, Optional[model]))}  # noqa: UP045
    must_match = rng.random() < 0.5
    options = (
        {"intent": ("before",), "must_match": ("order",)}
        if must_match
        else {"intent": rng.choice((("order",), ALL_ARGUMENTS))}
    )
    task = declared(app, place, pydantic=True, **options)
    calls = Sorted({})
    for _ in range(3):
        action = {name: _some(rng, kinds, fields, minting, name) for name in kinds}
        variants = [action, *({**action, name: _some(rng, kinds, fields, minting, name)} for name in kinds)]
        for variant in variants:
            for _ in range(3):
                given = [
                    (rng.choice((fields[name][1].alias or name, name)), rng.choice(kinds[name].values[which]))
                    for name, which in variant.items()
                    if which != UNSENT
                    and not (which == 0 and _defaulted(fields[name][1]) and rng.random() < 0.5)
                ]
                rng.shuffle(given)
                value: Any = dict(given)
                has_leaf = any("Leaf" in str(kinds[name].hint) for name in kinds)
                if UNSENT not in variant.values() and not has_leaf and rng.random() < 0.4:
                    value = model.model_validate(value)
                args, kwargs = rng.choice(
                    (((1, value), {}), ((1,), {"order": value}), ((), {"order": value, "before": 1}))
                )
                arguments = task.idem_declaration.bind(args, kwargs)
                identity = (
                    task.idem_declaration.key("idem", arguments)
                    + task.idem_declaration.fingerprint(arguments).packed.hex()
                )
                calls.add(sorted(variant.items()), identity)
    return "model", calls, str(fields)


def _defaulted(field: Any) -> bool:
    return not field.is_required() and field.default_factory is None


def _some(rng: random.Random, kinds: Any, fields: Any, minting: set[str], name: str) -> Any:
    if name in minting and rng.random() < 0.4:
        return UNSENT
    return rng.randrange(len(kinds[name].values))


# --- both ---------------------------------------------------------------------------------------


def made(seed: int, count: int) -> list[str]:
    """Return all keys in the order in which they were made.

    Raises AssertionError if two actions share a key or one action has two keys.
    """
    app = Celery("identity", broker="memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}")
    app.finalize()
    rng = random.Random(seed)
    found = []
    for number in range(count):
        what, calls, how = rng.choice((a_signature, a_model))(rng, app)
        calls.check(f"seed {seed}, number {number}, a {what}: {how}")
        found += [key for keys in calls.keys.values() for key in keys]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    chosen = parser.parse_args()
    print("\n".join(made(chosen.seed, chosen.count)))
