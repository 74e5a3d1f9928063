"""Where a task's options may be given. An attribute that a class already had is never read as an option."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, Task

from celery_idem import ALL_ARGUMENTS, ConfigurationError, IdempotentTask
from celery_idem.adapters.django import IdempotentDjangoTask
from celery_idem.integration.options import ConfigurationWarning
from celery_idem.integration.settings import NAMES, Settings
from celery_idem.operate import doctor


def make(**options: Any) -> Celery:
    app = Celery("options", set_as_current=False, broker="memory://", backend="cache+memory://", **options)
    app.conf.idem_store = f"memory://{uuid.uuid4().hex}"
    return app


def pay(order: str) -> str:
    return order


def declared(base: type[Task] = IdempotentTask, app: Celery | None = None, **options: Any) -> Any:
    options = {"name": "pay", "intent": ("order",), **options}
    return (app or make()).task(base=base, shared=False, lazy=False, **options)(pay)


def settings_of(task: Any) -> Settings:
    found: Settings = task.guard.settings
    return found


RIGHT: dict[str, Any] = {
    "store": "memory://of-its-own",
    "namespace": "billing",
    "lease": 7.0,
    "result_ttl": 8.0,
    "failure_ttl": 9.0,
    "on_duplicate": "raise",
    "on_crash": "rerun",
    "on_store_error": "raise",
    "max_attempts": 4,
    "max_result_bytes": 5,
    "durability": "fsync",
    "shadow": True,
    "audit": False,
    "audit_key": "a secret",
    "settle_patience": 6.0,
    "reconcile_timeout": 3.0,
    "keep_call": False,
    "max_call_bytes": 1000,
    "accept_on_publish": True,
    "recover": False,
    "late": "run",
    "scope": "tests.test_options:pay",
}


def test_every_setting_is_tried_here() -> None:
    assert set(RIGHT) == set(NAMES) - {"seal_keys"}
    assert all(value != getattr(Settings(), name) for name, value in RIGHT.items())


def in_the_decorator(name: str, value: Any) -> Any:
    return declared(**{name: value})


def in_the_body(name: str, value: Any) -> Any:
    parts = {"name": "pay", "intent": ("order",), "run": staticmethod(pay), name: value}
    return make().register_task(type("Pay", (IdempotentTask,), parts)())


def below_the_body(name: str, value: Any) -> Any:
    base = type("Pay", (IdempotentTask,), {"intent": ("order",), name: value})
    return make().task(base=base, name="pay", shared=False, lazy=False)(pay)


def in_annotations(name: str, value: Any) -> Any:
    app = make(task_cls=IdempotentTask)
    app.conf.task_annotations = {"pay": {"intent": ("order",), name: value}}
    return app.task(name="pay", shared=False, lazy=False)(pay)


def in_annotations_of_a_class(name: str, value: Any) -> Any:
    app = make()
    app.conf.task_annotations = {"pay": {name: value}}
    base = type("Base", (IdempotentTask,), {"intent": ("order",)})
    return app.register_task(type("Pay", (base,), {"name": "pay", "run": staticmethod(pay)})())


def in_a_base(name: str, value: Any) -> Any:
    return declared(type("Base", (IdempotentTask,), {name: value}))


def in_a_mixin(name: str, value: Any) -> Any:
    return declared(type("Base", (type("Mixin", (), {name: value}), IdempotentTask), {}))


def in_a_foreign_base(name: str, value: Any) -> Any:
    theirs = type("Theirs", (Task,), {name: value, "abstract": True})
    return declared(type("Base", (IdempotentTask, theirs), {}))


def in_djangos_base(name: str, value: Any) -> Any:
    from celery.contrib.django.task import DjangoTask

    theirs = type("Theirs", (DjangoTask,), {name: value, "abstract": True})
    app = make(task_cls=type("Base", (IdempotentDjangoTask, theirs), {}))
    return app.task(name="pay", intent=("order",), shared=False, lazy=False)(pay)


def in_flasks_base(name: str, value: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    app = make(task_cls=type("FlaskTask", (IdempotentTask,), {"__call__": call, name: value}))
    return app.task(name="pay", intent=("order",), shared=False, lazy=False)(pay)


def in_the_decorator_of_an_annotated_task(name: str, value: Any) -> Any:
    app = make(task_cls=IdempotentTask)
    app.conf.task_annotations = {"pay": {"intent": ("order",)}}
    return app.task(name="pay", shared=False, lazy=False, **{name: value})(pay)


def in_a_subclass(name: str, value: Any) -> Any:
    base = type("Pay", (IdempotentTask,), {"intent": ("order",)})
    return make().register_task(
        type("Fast", (base,), {"name": "pay", "run": staticmethod(pay), name: value})()
    )


BESIDE_THE_INTENT = [in_the_decorator, in_the_body, below_the_body, in_annotations, in_annotations_of_a_class]
ELSEWHERE = [
    in_a_base,
    in_a_mixin,
    in_a_foreign_base,
    in_djangos_base,
    in_flasks_base,
    in_the_decorator_of_an_annotated_task,
    in_a_subclass,
]
WARNED = {in_a_base, in_a_subclass}
"""Classes that their author derived from IdempotentTask for some tasks: only these cause a warning."""

Place = Callable[[str, Any], Any]


@pytest.mark.parametrize("place", BESIDE_THE_INTENT)
@pytest.mark.parametrize("name", RIGHT)
def test_beside_the_intent_both_names_are_settings(place: Place, name: str) -> None:
    for written in (name, f"idem_{name}"):
        assert getattr(settings_of_class(place(written, RIGHT[name])), name) == RIGHT[name]


def settings_of_class(task: Any) -> Settings:
    """The settings of a task, without opening its store: not every value here fits the store."""
    from celery_idem.integration.declaring import settings_of as of_class

    return of_class(
        type(task._get_current_object() if hasattr(task, "_get_current_object") else task), task.app
    )


@pytest.mark.parametrize("place", ELSEWHERE)
@pytest.mark.parametrize("name", RIGHT)
def test_elsewhere_only_the_full_name_is_a_setting(place: Place, name: str) -> None:
    value = RIGHT[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task = place(name, value)
    assert settings_of_class(task) == settings_of_class(declared(app=task.app, name="other"))
    assert getattr(task, name) == value, "the attribute is its author's"
    said = [str(one.message) for one in caught if one.category is ConfigurationWarning]
    assert len(said) == (place in WARNED), said
    assert all(f".{name} is not read as a setting" in one and f"Write idem_{name} " in one for one in said)
    assert findings(task.app) == {f".{name}": f"Write idem_{name}"}

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConfigurationWarning)
        task = place(f"idem_{name}", value)
    assert getattr(settings_of_class(task), name) == value
    assert findings(task.app) == {}


def findings(app: Celery) -> dict[str, str]:
    """What the doctor reports about attributes that are not settings: the attribute, and what to write instead."""
    snapshot = doctor.gather(app, ask=False)
    found = [f for f in doctor.examine(snapshot, doctor.CHEAP) if f.code == "not-a-setting"]
    return {"." + f.where.rpartition(".")[2]: " ".join(f.change.split()[:2]) for f in found}


BEFORE: dict[str, Any] = {
    "store": object(),
    "namespace": "billing:eu",
    "audit": type("Audit", (), {}),
    "lease": "until december",
    "shadow": "#000",
    "scope": ["read", "write"],
    "durability": 3,
    "max_attempts": None,
}
"""Values that a class may have had under these names. None of them is a valid value of the setting."""


@pytest.mark.parametrize("place", ELSEWHERE)
def test_what_a_class_had_before_is_left_alone(place: Place) -> None:
    for name, value in BEFORE.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConfigurationWarning)
            task = place(name, value)
        assert getattr(task, name) is value
        assert task.apply(("a",)).get() == task.apply(("a",)).get() == "a"


@pytest.mark.parametrize("place", [in_the_decorator, in_the_body, in_annotations])
@pytest.mark.parametrize("name", BEFORE)
def test_beside_the_intent_it_is_an_error_that_says_both_ways_out(place: Place, name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        place(name, BEFORE[name])
    said = str(caught.value)
    assert said.startswith(f"pay: {name} cannot be ")
    assert "use " in said
    assert "rename it, or move it to a base class" in said
    assert f"only idem_{name} is a setting" in said


def test_a_method_of_a_base_is_no_setting_and_no_mistake() -> None:
    class Base(IdempotentTask):
        abstract = True

        def store(self, row: str) -> str:
            return f"stored {row}"

        @property
        def namespace(self) -> str:
            return "its own"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = declared(Base)
    assert (task.store("a"), task.namespace) == ("stored a", "its own")
    assert findings(task.app) == {}


def test_a_shared_base_and_the_task_itself() -> None:
    class Patient(IdempotentTask):
        abstract = True
        idem_lease = 60
        idem_on_crash = "rerun"

    class Impatient(Patient):
        idem_lease = 50

    app = make()
    app.conf.idem_lease, app.conf.idem_max_attempts = 40, 9
    found = settings_of(declared(Impatient, app, name="a", on_crash="resume"))
    assert (found.lease, found.on_crash, found.max_attempts) == (50, "resume", 9)
    assert settings_of(declared(Impatient, app, name="b", lease=3)).lease == 3
    app.conf.task_annotations = {"c": {"idem_lease": 2}, "d": {"lease": 1}}
    vars(app).pop("annotations", None)  # Celery caches them
    assert settings_of(declared(Impatient, app, name="c", lease=3)).lease == 2
    assert settings_of(declared(Impatient, app, name="d", idem_lease=3)).lease == 1


def for_all_tasks(every: dict[str, Any], named: dict[str, Any] | None = None, **options: Any) -> Any:
    app = make(task_cls=IdempotentTask)
    app.conf.task_annotations = {"*": every, "pay": named or {}}
    return app.task(name="pay", shared=False, lazy=False, **options)(pay)


def test_for_all_tasks_a_setting_has_its_full_name() -> None:
    for name, value in RIGHT.items():
        with pytest.raises(
            ConfigurationError, match=rf'annotations\["\*"\]: write idem_{name} for {name}, or'
        ):
            for_all_tasks({name: value}, intent=("order",))
        for_all_tasks({name: value})  # an ordinary task
        found = settings_of_class(for_all_tasks({f"idem_{name}": value}, intent=("order",)))
        assert getattr(found, name) == value


def test_an_intent_for_all_tasks_is_refused() -> None:
    """It would replace the intent of each task, and Celery's nightly cleanup would run only once."""
    for own in ({}, {"intent": ("order",)}):
        with pytest.raises(ConfigurationError, match="under the name of each task"):
            for_all_tasks({"intent": ALL_ARGUMENTS}, **own)


def test_what_is_said_of_one_task_wins_over_what_is_said_of_all() -> None:
    task = for_all_tasks({"idem_lease": 5, "idem_max_attempts": 2}, {"lease": 7}, intent=("order",), lease=3)
    assert (settings_of(task).lease, settings_of(task).max_attempts) == (7, 2)
    assert settings_of(for_all_tasks({"idem_lease": 5}, {"idem_lease": 7}, intent=("order",))).lease == 7


@pytest.mark.parametrize("place", BESIDE_THE_INTENT)
def test_one_place_gives_a_setting_once(place: Place) -> None:
    class Twice(dict[str, Any]):
        """A dictionary with two names for one option."""

    def twice(**options: Any) -> Any:
        if place is in_the_decorator:
            return declared(**options)
        if place in (in_annotations, in_annotations_of_a_class):
            app = make(task_cls=IdempotentTask)
            app.conf.task_annotations = {"pay": {"intent": ("order",), **options}}
            return app.task(name="pay", shared=False, lazy=False)(pay)
        base = type("Pay", (IdempotentTask,), {"intent": ("order",), **options})
        return make().task(base=base, name="pay", shared=False, lazy=False)(pay)

    with pytest.raises(ConfigurationError, match="pay: lease and idem_lease are given in one place"):
        twice(lease=5, idem_lease=5)


@pytest.mark.parametrize("place", BESIDE_THE_INTENT + ELSEWHERE)
def test_a_misspelt_full_name_is_an_error_that_offers_the_nearest(place: Place) -> None:
    with pytest.raises(
        ConfigurationError, match=r"pay: there is no setting idem_leese\. Did you mean idem_lease\?"
    ):
        place("idem_leese", 5)
    with pytest.raises(ConfigurationError, match=r"no setting idem_must_match\. Did you mean must_match\?"):
        place("idem_must_match", ("order",))


@pytest.mark.parametrize("place", [in_the_decorator, in_the_body, below_the_body, in_annotations])
def test_a_misspelt_short_name_is_an_error_beside_the_intent(place: Place) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no option on_crahs=\. Did you mean on_crash=\?"):
        place("on_crahs", "rerun")


@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_name_like_a_setting_is_its_authors_elsewhere(place: Place) -> None:
    assert place("stores", 5).stores == 5


def test_an_ordinary_task_may_have_any_attribute() -> None:
    app = make(task_cls=IdempotentTask)
    own = {**BEFORE, "idem_lease": "mine", "idem_anything": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = app.task(name="ordinary", shared=False, lazy=False, **own)(pay)
    assert {name: getattr(task, name) for name in own} == own
    assert task.apply(("a",)).get() == "a"
    assert findings(app) == {}


def test_a_foreign_secret_is_not_shown() -> None:
    theirs = type("Webhook", (Task,), {"secret": "hunter2", "abstract": True})
    base = type("Base", (theirs, IdempotentTask), {})
    with pytest.raises(ConfigurationError, match="`secret` of Webhook does not name parameters") as caught:
        declared(base)
    assert "hunter2" not in str(caught.value)
    assert declared(base, secret=()).idem_declaration.secret == ()
    assert declared(base, secret="order").idem_declaration.secret == ("order",)
