"""Models as arguments: one message always has the same key, and two actions never share one."""

from __future__ import annotations

import dataclasses
import datetime as dt
import inspect
import typing
import uuid
from collections.abc import Callable, Iterator
from decimal import Decimal
from ipaddress import IPv4Address
from typing import Any, Literal, NamedTuple, Optional, Union

import pydantic
import pytest
from celery import Celery
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, RootModel, SecretBytes, SecretStr

from celery_idem import ALL_ARGUMENTS, IdempotentTask, IntentError
from tests.test_signatures import passing

pytest.importorskip("celery.utils.annotations", reason="Celery supports models since 5.5")


def an_app() -> Celery:
    app = Celery("models", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(idem_store=f"memory://{uuid.uuid4().hex}", task_always_eager=False)
    return app


def a_task(
    fun: Callable[..., Any], intent: Any = ALL_ARGUMENTS, pydantic: bool = True, **options: Any
) -> Any:
    inside = inspect.unwrap(fun)
    inside.__annotations__ = typing.get_type_hints(inside)  # Celery 5.5 does not evaluate text annotations
    app = an_app()
    app.task(
        base=IdempotentTask, name="shop.place", intent=intent, shared=False, pydantic=pydantic, **options
    )(fun)
    return app.tasks["shop.place"]


def taking(hint: Any, **options: Any) -> Any:
    """A task with one parameter of this annotation."""

    def place(x) -> None: ...  # type: ignore[no-untyped-def]

    place.__annotations__ = {"x": hint}
    return a_task(place, **options)


class Line(BaseModel):
    sku: str
    count: int = 1


class Order(BaseModel):
    number: int
    lines: list[Line] = Field(default_factory=list)
    note: str = Field("", exclude=True)
    price: Decimal = Decimal(0)
    at: dt.datetime | None = None
    tags: set[str] = set()
    token: SecretStr = SecretStr("")
    gift: Line | None = None


class Traced(BaseModel):
    number: int
    trace: uuid.UUID = Field(default_factory=uuid.uuid4)
    seen: dt.datetime = Field(default_factory=lambda: dt.datetime.now(dt.timezone.utc))


# --- where a dictionary is a model ------------------------------------------------------------


@pytest.mark.parametrize("hint", [Line, Optional[Line], Union[None, Line], Line | None])  # noqa: UP007, UP045
def test_a_dictionary_is_a_model_where_celery_makes_one_of_it(hint: Any) -> None:
    key = taking(hint).intent_key
    assert (
        key({"sku": "a"})
        == key({"sku": "a", "count": 1})
        == key({"count": "1", "sku": "a"})
        == key(Line(sku="a"))
    )
    assert key({"sku": "a"}) != key({"sku": "b"})
    assert key({"sku": "a"}) != key({"sku": "a", "count": 2})


class Card(BaseModel):
    amount: int
    last4: str = ""


class Transfer(BaseModel):
    amount: int
    iban: str = ""


@pytest.mark.parametrize(
    "hint",
    [
        Card | Transfer,
        Union[Card, Transfer, None],  # noqa: UP007
        dict[str, Card],
        list[Card],
        "Card",
        Any,
        dict,
        Literal["x"],
    ],
    ids=str,
)
def test_anywhere_else_it_stays_what_it_is(hint: Any) -> None:
    key = taking(hint).intent_key
    different = [
        {"amount": 5, "last4": "1111"},
        {"amount": 5, "last4": "2222"},
        {"amount": 5, "iban": "3"},
        {"amount": 5},
        {"apples": {"amount": 1}},
        {"pears": {"amount": 1}, "apples": {"amount": 1}},
        {},
    ]
    if hint == "Card":  # Celery evaluates the text too, so a dictionary becomes a model
        different = [d for d in different if "iban" not in d and "amount" in d]
    assert len({key(value) for value in different}) == len(different)


def test_without_pydantic_true_a_dictionary_is_a_dictionary() -> None:
    key = taking(Line, pydantic=False).intent_key
    assert key({"sku": "a"}) != key({"sku": "a", "count": 1}), "the body gets two different dictionaries"
    assert key({"sku": "a", "count": 1}) == key(Line(sku="a"))


def test_what_is_no_valid_model_stays_as_it_is() -> None:
    key = taking(Line).intent_key
    assert (
        len({key({"sku": "a", "count": "x"}), key({"sku": "a", "count": "y"}), key({}), key("x"), key(None)})
        == 5
    )


def test_strict_models_are_read_strictly() -> None:
    lax, strict = taking(Line).intent_key, taking(Line, pydantic_strict=True).intent_key
    assert lax({"sku": "a", "count": "2"}) == lax({"sku": "a", "count": 2})
    assert strict({"sku": "a", "count": "2"}) != strict({"sku": "a", "count": 2}), (
        "the body refuses the first"
    )


def test_validators_have_celerys_context() -> None:
    seen: list[Any] = []

    class Asking(BaseModel):
        name: str

        @pydantic.field_validator("name")
        @classmethod
        def known(cls, value: str, info: pydantic.ValidationInfo) -> str:
            seen.append(info.context)
            return value.strip().lower()

    task = taking(Asking, pydantic_context={"mine": 1})
    assert (
        task.intent_key({"name": " ADA"})
        == task.intent_key({"name": "ada"})
        == task.intent_key(Asking(name="Ada"))
    )
    assert seen[0] == {"mine": 1, "celery_app": task.app, "celery_task_name": "shop.place"}


def test_a_decorated_body() -> None:
    def place(order: Line, note: str = "") -> None: ...

    task = a_task(passing(place), ("order",))
    assert task.intent_key({"sku": "a"}) == task.intent_key(order={"sku": "a", "count": 1}, note="x")
    assert task.intent_key({"sku": "a"}) != task.intent_key({"sku": "b"})


# --- which values ---------------------------------------------------------------------------


SAME: dict[str, list[Any]] = {
    "zones": [
        {"number": 1, "at": "2026-11-01T12:00:00Z"},
        {"number": 1, "at": "2026-11-01T14:00:00+02:00"},
        {"number": 1, "at": dt.datetime(2026, 11, 1, 12, tzinfo=dt.timezone.utc)},
    ],
    "zeros": [{"number": 1, "price": p} for p in ("1.50", "1.5", 1.5, Decimal("1.500"))],
    "sets": [{"number": 1, "tags": t} for t in (["a", "b"], ["b", "a", "b"], {"a", "b"})],
    "nested": [
        {"number": 1, "lines": [line]} for line in ({"sku": "a"}, {"sku": "a", "count": 1}, Line(sku="a"))
    ],
    "optional": [{"number": 1, "gift": g} for g in ({"sku": "a"}, Line(sku="a", count=1))],
    "defaults": [{"number": 1}, {"number": 1, "lines": [], "note": "", "price": 0, "at": None, "tags": []}],
}
DIFFERENT: list[dict[str, Any]] = [
    {"number": 1},
    {"number": 2},
    {"number": 1, "note": "excluded from what is dumped"},
    {"number": 1, "token": "secret"},
    {"number": 1, "token": "other"},
    {"number": 1, "at": "2026-11-01T12:00:00Z"},
    {"number": 1, "at": "2026-11-01T12:00:00+02:00"},
    {"number": 1, "tags": ["a"]},
    {"number": 1, "tags": ["a", "b"]},
    {"number": 1, "lines": [{"sku": "a"}]},
    {"number": 1, "lines": [{"sku": "a", "count": 2}]},
    {"number": 1, "lines": [{"sku": "a"}, {"sku": "b"}]},
    {"number": 1, "lines": [{"sku": "b"}, {"sku": "a"}]},
    {"number": 1, "gift": {"sku": "a"}},
    {"number": 1, "price": "0.1"},
]


@pytest.mark.parametrize("kind", SAME)
def test_one_action_has_one_key(kind: str) -> None:
    key = taking(Order).intent_key
    assert (
        len({key(value) for value in SAME[kind]} | {key(Order.model_validate(value)) for value in SAME[kind]})
        == 1
    )


def test_two_actions_have_two() -> None:
    key = taking(Order).intent_key
    as_dictionaries = [key(value) for value in DIFFERENT]
    assert len(set(as_dictionaries)) == len(DIFFERENT)
    assert [key(Order.model_validate(value)) for value in DIFFERENT] == as_dictionaries


def test_aliases_extra_fields_and_computed_ones() -> None:
    class Any_(BaseModel):  # noqa: N801
        model_config = ConfigDict(extra="allow", populate_by_name=True)
        number: int = Field(alias="orderNumber")

        @pydantic.computed_field
        def random(self) -> str:
            return uuid.uuid4().hex

    key = taking(Any_).intent_key
    assert key({"orderNumber": 1}) == key({"number": 1}) == key(Any_(number=1))  # type: ignore[call-arg]
    assert len({key({"number": 1}), key({"number": 1, "more": 2}), key({"number": 1, "more": 3})}) == 3
    assert key({"number": 1, "more": 2}) == key(Any_(number=1, more=2))  # type: ignore[call-arg]


def test_root_models_and_generic_ones() -> None:
    class Numbers(RootModel[list[int]]):
        pass

    key = taking(Numbers).intent_key
    assert key([1, 2]) == key(["1", 2]) == key(Numbers([1, 2])) != key([2, 1])
    assert key([1, 2]) == taking(Any, pydantic=False).intent_key([1, 2])


def test_types_that_models_bring() -> None:
    class Host(BaseModel):
        url: HttpUrl
        ip: IPv4Address = IPv4Address("127.0.0.1")
        raw: SecretBytes = SecretBytes(b"")
        span: dt.timedelta = dt.timedelta(0)

    key = taking(Host).intent_key
    values = [
        {"url": "https://a.example/"},
        {"url": "https://b.example/"},
        {"url": "https://a.example/", "ip": "10.0.0.1"},
        {"url": "https://a.example/", "raw": "x"},
        {"url": "https://a.example/", "raw": "y"},
        {"url": "https://a.example/", "span": "PT1H"},
    ]
    assert len({key(value) for value in values}) == len(values)
    assert key({"url": "HTTPS://A.example"}) == key(values[0]) == key(Host(url="https://a.example"))  # type: ignore[arg-type]
    assert key(IPv4Address("10.0.0.1")) != key("10.0.0.1")


class Opaque:
    pass


class Holding(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    at: dt.datetime | None = None
    what: Opaque | None = None
    token: SecretStr = SecretStr("")


@pytest.mark.parametrize(
    "value", [{"at": "2026-11-01T12:00:00", "token": "hunter2"}, {"what": Opaque(), "token": "hunter2"}]
)
def test_what_has_no_canonical_form_is_refused_by_name(value: Any) -> None:
    for task in (taking(Holding), taking(Holding, intent=lambda a: {"x": a["x"]})):
        for given in (value, Holding.model_validate(value)):
            with pytest.raises(IntentError, match="'x'") as caught:
                task.intent_key(given)
            assert caught.value.parameter == "x"
            assert "hunter2" not in str(caught.value)


def test_a_secret_is_in_no_canonical_form() -> None:
    declaration = taking(Holding).idem_declaration
    assert "hunter2" not in str(declaration.intent(declaration.bind(({"token": "hunter2"},), {})))


# --- values that the model generates ------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"intent": ("note",), "must_match": ("x",)}], ids=["intent", "must_match"]
)
def test_a_minted_value_is_in_no_key_and_no_fingerprint(options: Any) -> None:
    def place(x: Traced, note: str = "") -> None: ...

    declaration = a_task(place, **options).idem_declaration

    def identity(value: Any) -> Any:
        arguments = declaration.bind((value,), {})
        return declaration.key("idem", arguments), declaration.fingerprint(arguments)

    assert identity({"number": 1}) == identity({"number": 1})
    assert identity({"number": 1}) != identity({"number": 2})
    sent = {"number": 1, "trace": uuid.uuid4()}
    assert identity(sent) == identity(dict(sent))
    assert identity(sent) != identity({**sent, "trace": uuid.uuid4()}), (
        "what the caller sends is the caller's"
    )
    mine = Traced(number=1)
    assert (
        identity(mine)
        == identity(mine)
        == identity(mine.model_dump())
        == identity(mine.model_dump(mode="json"))
    )
    assert identity(mine) != identity(Traced(number=1)), (
        "an object that the caller made has the caller's values"
    )


def test_also_with_a_callers_key_and_a_computed_intent() -> None:
    declaration = taking(Traced).idem_declaration
    one, other = (declaration.bind(({"number": 1},), {}) for _ in range(2))
    assert declaration.fingerprint(one, "key") == declaration.fingerprint(other, "key")
    key = taking(Traced, intent=lambda a: {"order": a["x"]}).intent_key
    assert key({"number": 1}) == key({"number": 1}) != key({"number": 2})
    by_field = taking(Traced, intent=lambda a: {"n": a["x"].number}).intent_key
    assert by_field({"number": 1}) == by_field(Traced(number=1))
    with pytest.raises(AttributeError):  # never a key from values that were not sent
        taking(Traced, intent=lambda a: {"t": a["x"].trace}).intent_key({"number": 1})


class Parcel(BaseModel):
    number: int
    first: Traced
    rest: list[Traced] = Field(default_factory=list)
    named: dict[str, tuple[Traced, int]] = Field(default_factory=dict)
    own: Traced = Field(default_factory=lambda: Traced(number=7))
    plain: Line = Field(default_factory=lambda: Line(sku="x"))
    extra: Traced | Line | None = None


class Boxed(BaseModel):
    line: Line = Field(default=Line(sku="a"))
    parcel: Parcel | None = None


@pytest.mark.parametrize(
    "value",
    [
        {"number": 1, "first": {"number": 2}},
        {"number": 1, "first": {"number": 2}, "rest": [{"number": 3}, {"number": 4}]},
        {"number": 1, "first": {"number": 2}, "named": {"a": [{"number": 3}, 4]}},
        {"number": 1, "first": {"number": 2}, "own": {"number": 7}},
        {"number": 1, "first": {"number": 2}, "extra": {"number": 9}},
    ],
)
def test_nothing_nested_is_minted(value: Any) -> None:
    key, boxed = taking(Parcel).intent_key, taking(Boxed).intent_key
    assert len({key(value) for _ in range(5)}) == 1
    assert len({boxed({"parcel": value}) for _ in range(5)}) == 1
    assert key(value) != key({**value, "number": 2})
    assert key(value) != key({**value, "first": {"number": 3}})


def test_a_model_as_a_factory_is_its_defaults() -> None:
    class Limits(BaseModel):
        cpu: int = 1

    class Job(BaseModel):
        limits: Limits = Field(default_factory=Limits)

    key = taking(Job).intent_key
    assert (
        key({})
        == key({"limits": {}})
        == key({"limits": {"cpu": 1}})
        == key(Job())
        != key({"limits": {"cpu": 2}})
    )


def test_a_model_as_a_default_is_the_same_in_every_process() -> None:
    def make() -> Any:  # each process does this when it imports the module
        def place(x: Traced = Traced(number=1)) -> None: ...  # noqa: B008

        return a_task(place).intent_key

    assert make()() == make()() == make()({"number": 1})


def test_validators_that_mint_are_refused() -> None:
    class Before(BaseModel):
        number: int
        trace: str

        @pydantic.model_validator(mode="before")
        @classmethod
        def traced(cls, data: Any) -> Any:
            return {"trace": uuid.uuid4().hex, **data}

    class After(BaseModel):
        number: int
        trace: str = ""

        def model_post_init(self, context: Any) -> None:
            self.trace = self.trace or uuid.uuid4().hex

    for model in (Before, After):
        for task in (taking(model), taking(model, intent=lambda a: {"x": a["x"]})):
            with pytest.raises(IntentError, match="validators return another value each time") as caught:
                task.intent_key({"number": 1})
            assert caught.value.parameter == "x"
            assert task.intent_key({"number": 1, "trace": "a"}) == task.intent_key(
                {"number": 1, "trace": "a"}
            )


def test_a_validator_that_breaks_is_refused_and_not_read_in_another_way() -> None:
    """If the arguments were read as they are while a database is down, their key would change when it is back."""

    class Asking(BaseModel):
        number: int

        @pydantic.field_validator("number")
        @classmethod
        def known(cls, value: int) -> int:
            raise ConnectionError("no database")

    with pytest.raises(IntentError, match="reading it failed with ConnectionError"):
        taking(Asking).intent_key({"number": 1})


@dataclasses.dataclass
class Stamped:
    number: int
    trace: uuid.UUID = dataclasses.field(default_factory=uuid.uuid4)


@dataclasses.dataclass
class Plain:
    number: int
    tags: list[str] = dataclasses.field(default_factory=list)


class Pair(NamedTuple):
    traced: Traced
    plain: Plain


def test_dataclasses() -> None:
    mine = Stamped(1)
    key = taking(Stamped).intent_key
    assert key(mine) == key(mine) != key(Stamped(1)), "the caller's own object has the caller's values"

    class Holding(BaseModel):
        plain: Plain
        pair: Pair | None = None
        traced: Traced | None = None
        stamped: Stamped | None = None

    key = taking(Holding).intent_key
    assert (
        key({"plain": {"number": 1}})
        == key({"plain": {"number": 1, "tags": []}})
        == key(Holding(plain=Plain(1)))
    )
    pair = {"plain": {"number": 1}, "pair": ({"number": 2}, {"number": 3})}
    assert key(pair) == key(pair)
    with pytest.raises(IntentError, match="Stamped has a default_factory for 'trace'") as caught:
        key({"plain": {"number": 1}, "stamped": {"number": 1}})
    assert caught.value.parameter == "x"


def test_a_free_parameter_is_never_read() -> None:
    def place(number: int, x: Traced, other: Holding) -> None: ...

    key = a_task(place, ("number",)).intent_key
    assert key(1, {"number": "no number"}, {"what": object()}) == key(1, {}, {})


# --- what a body gets ----------------------------------------------------------------------------


def one_by_one(task: Any, values: list[Any]) -> Iterator[Any]:
    for value in values:
        yield task.apply((value,)).get()


def test_the_body_gets_all_that_the_model_makes() -> None:
    got = []

    def place(order: Traced) -> str:
        got.append(order)
        return str(order.trace)

    task = a_task(place)
    one, again, other = one_by_one(task, [{"number": 1}, {"number": 1}, {"number": 2}])
    assert one == again != other
    assert [order.number for order in got] == [1, 2]
    assert all(isinstance(order.seen, dt.datetime) for order in got)
