"""``idem_*`` in app.conf, and the same settings as task options: where they come from, and misspelt names."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_idem import ConfigurationError, IdempotentTask, Ledger
from celery_idem.core.model import Policy
from celery_idem.integration import settings
from celery_idem.integration.settings import NAMES, Settings, of_app
from celery_idem.integration.wiring import ledger_of, store_of


def an_app(**conf: Any) -> Celery:
    app = Celery("settings", set_as_current=False)
    app.conf.update(conf)
    return app


def body(a: int) -> None: ...


# --- where they come from ------------------------------------------------------------------


def test_the_defaults() -> None:
    assert of_app(an_app().conf) == Settings() == Settings(
        store="",
        namespace="idem",
        lease=30.0,
        result_ttl=86_400.0,
        failure_ttl=None,
        on_duplicate="wait",
        on_crash="in_doubt",
        on_store_error="retry",
        max_attempts=3,
        max_result_bytes=1024 * 1024,
        durability="none",
        shadow=False,
    )  # fmt: skip


def test_the_constructor_and_update() -> None:
    assert of_app(Celery("a", set_as_current=False, idem_lease=7).conf).lease == 7
    assert of_app(an_app(idem_lease=8).conf).lease == 8


def test_attributes_of_the_configuration() -> None:
    app = an_app()
    app.conf.idem_lease = 9
    assert of_app(app.conf).lease == 9


def test_a_configuration_object() -> None:
    app = Celery("a", set_as_current=False)
    app.config_from_object(SimpleNamespace(idem_lease=10))
    assert of_app(app.conf).lease == 10


def test_djangos_namespace() -> None:
    app = Celery("a", set_as_current=False)
    app.config_from_object(
        SimpleNamespace(CELERY_IDEM_LEASE=11, CELERY_IDEM_ON_CRASH="rerun"), namespace="CELERY"
    )
    found = of_app(app.conf)
    assert (found.lease, found.on_crash) == (11, "rerun")


def test_a_misspelt_one_in_djangos_namespace() -> None:
    app = Celery("a", set_as_current=False)
    app.config_from_object(SimpleNamespace(CELERY_IDEM_LAESE=11), namespace="CELERY")
    with pytest.raises(ConfigurationError, match="lease"):
        of_app(app.conf)


CAPITALS: list[Callable[[Celery], object]] = [
    lambda app: app.config_from_object(SimpleNamespace(IDEM_LEASE=11)),
    lambda app: app.config_from_object({"IDEM_LEASE": 11, "broker_url": "memory://"}),
    lambda app: app.config_from_object(
        SimpleNamespace(IDEM_LEASE=11, CELERY_IDEM_STORE="memory://"), namespace="CELERY"
    ),
    lambda app: app.conf.update(IDEM_LEASE=11),
    lambda app: setattr(app.conf, "IDEM_LEASE", 11),
    lambda app: app.conf.update(Idem_Lease=11),
]


@pytest.mark.parametrize("configure", CAPITALS)
def test_capitals_without_a_namespace_are_not_silently_ignored(configure: Callable[[Celery], object]) -> None:
    app = Celery("a", set_as_current=False)
    configure(app)
    with pytest.raises(
        ConfigurationError, match=r"(?i)IDEM_LEASE .* does nothing.* Write idem_lease, or CELERY_"
    ):
        of_app(app.conf)


def test_a_constant_in_capitals_beside_the_setting_is_nobodys_mistake() -> None:
    app = Celery("a", set_as_current=False)
    app.config_from_object(SimpleNamespace(IDEM_LEASE=11, idem_lease=11, IDEM_REGION="eu", MY_IDEM_STORE="x"))
    assert of_app(app.conf).lease == 11
    app = Celery("a", set_as_current=False)
    app.config_from_object(SimpleNamespace(IDEM_LEASE=11, CELERY_IDEM_LEASE=12), namespace="CELERY")
    assert of_app(app.conf).lease == 12


# --- misspelt names ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("idem_leese", "idem_lease"),
        ("idem_on_crashed", "idem_on_crash"),
        ("idem_results_ttl", "idem_result_ttl"),
    ],
)
def test_a_misspelt_setting_is_an_error_that_offers_the_nearest(written: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"Did you mean {meant}\\?"):
        of_app(an_app(**{written: 1}).conf)


SLIPS = {
    "lease": "leese laese leas leases lesae",
    "store": "stroe sotre stores",
    "audit": "audits aduit adit",
    "audit_key": "auditkey audit_keys",
    "shadow": "shaddow shadows",
    "namespace": "namespaces name_space namepsace",
    "on_crash": "on_crashed on_crahs oncrash crash",
    "on_duplicate": "on_duplicates on_dupicate duplicate",
    "on_store_error": "on_store_errors store_error",
    "result_ttl": "results_ttl resultttl result_tll",
    "failure_ttl": "failures_ttl failed_ttl fail_ttl",
    "max_attempts": "max_attempt maxattempts attempts",
    "max_result_bytes": "max_results_bytes max_result_size",
    "durability": "durabilty durabilities",
    "settle_patience": "setle_patience settle_patients",
    "reconcile_timeout": "reconcile_timout reconcile_time reconciliation_timeout",
    "scope": "scopes scoope scpoe",
    "keep_call": "keep_calls keepcall keep_cal",
    "max_call_bytes": "max_calls_bytes max_call_byte max_callbytes",
    "accept_on_publish": "accept_on_publsh accepts_on_publish accept_publish",
    "recover": "recovers recovery recver",
    "late": "lates laet latee",
    "seal_keys": "seal_key sealkeys sealed_keys",
}

OTHER_THINGS = (
    "xyzzy backend broker url timeout ttl key keys enabled debug region retries queue workers secret password host "
    "port database schema serializer expire heartbeat visibility_timeout interval limit concurrency pool log_level "
    "hash salt version intent must_match strategy mode policy cache events metrics callback on_success "
    "on_replay on_retry header name token owner max_retries result_expires settle_timeout leader shade audit_secret"
)


@pytest.mark.parametrize("meant", SLIPS)
def test_a_slip_of_the_pen_is_recognized(meant: str) -> None:
    for slip in SLIPS[meant].split():
        with pytest.raises(ConfigurationError, match=f"Did you mean idem_{meant}\\?"):
            of_app({f"idem_{slip}": 1})


def test_the_table_has_a_slip_of_each_setting() -> None:
    assert set(SLIPS) == set(NAMES)


@pytest.mark.parametrize("name", OTHER_THINGS.split())
def test_another_thing_is_taken_for_no_slip(name: str) -> None:
    """A far-fetched suggestion misleads. The error lists all names instead."""
    with pytest.raises(ConfigurationError, match=f"no setting idem_{name}. There are: idem_store, "):
        of_app({f"idem_{name}": 1})


def test_one_like_nothing_we_have_lists_them_all() -> None:
    with pytest.raises(ConfigurationError) as caught:
        of_app(an_app(idem_zzzzqqqq=1).conf)
    for name in NAMES:
        assert f"idem_{name}" in str(caught.value)


def test_a_misspelt_setting_stops_a_task_from_being_declared() -> None:
    app = an_app(idem_leese=1, idem_store="memory://")
    with pytest.raises(ConfigurationError, match="idem_lease"):

        @app.task(base=IdempotentTask, intent=("a",), lazy=False, shared=False)
        def pay(a: int) -> None: ...

    assert "pay" not in str(list(app._tasks))


def test_a_misspelt_option_of_a_task_is_an_error() -> None:
    app = an_app(idem_store="memory://")
    for slip, meant in [
        ("must_mach", "must_match"),
        ("on_crahs", "on_crash"),
        ("idem_laese", "idem_lease"),
        ("idem_must_match", "must_match"),
        ("intents", "intent"),
    ]:
        with pytest.raises(ConfigurationError, match=f"Did you mean {meant}[=?]"):
            app.task(
                base=IdempotentTask,
                shared=False,
                intent=("a",),
                lazy=False,
                name=f"slip.{slip}",
                **{slip: ("a",)},
            )(body)
        assert f"slip.{slip}" not in app._tasks


# --- values -------------------------------------------------------------------------------------

WRONG: dict[str, list[Any]] = {
    "store": [5, None],
    "namespace": ["", "a:b", 5, None],
    "lease": [0, -1, 0.01, "30", None, True, math.nan],
    "result_ttl": [-1, "day", None, math.nan, math.inf],
    "failure_ttl": [-1, "day", math.inf],
    "on_duplicate": ["waits", None, True],
    "late": ["runs", None, True],
    "on_crash": ["retry", None],
    "on_store_error": ["ignore", None],
    "max_attempts": [0, -1, 1.5, 256, None, True],
    "max_result_bytes": [0, -1, 1.5, None, 1 << 40],
    "durability": ["", "replicas:0", "replicas:-1", "replicas", "disk", None, "fsync "],
    "shadow": [1, 0, "yes", None],
    "audit": [1, 0, "yes", None],
    "audit_key": [5, None],
    "settle_patience": [-1, None, math.inf],
    "reconcile_timeout": [-1, None, math.inf],
    "scope": ["acme", 5, True, lambda request: "acme"],
    "keep_call": [1, 0, "yes", None],
    "max_call_bytes": [0, -1, 1.5, None, 1 << 40],
    "accept_on_publish": [1, 0, "yes", None],
    "recover": [1, 0, "yes", None],
    "seal_keys": [None, "hunter2", ["hunter2"], [""], [5], 5, [b"x" * 32]],
}


def test_every_setting_is_checked_here() -> None:
    assert set(WRONG) == set(NAMES)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_an_error_that_says_what_is_allowed(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"idem_{name} cannot be .*: use "):
        of_app(an_app(**{f"idem_{name}": value}).conf)


def test_a_stores_password_is_not_shown() -> None:
    app = an_app(idem_store="radis://:s3cret@host/1")
    with pytest.raises(ConfigurationError) as caught:
        ledger_of(app)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", ["none", "fsync", "replicas:1", "replicas:2"])
def test_right_values(value: str) -> None:
    assert of_app(an_app(idem_durability=value).conf).durability == value
    assert of_app(an_app(idem_failure_ttl=None, idem_result_ttl=0, idem_shadow=True, idem_lease=0.1).conf)


def test_a_tasks_options_come_before_the_applications() -> None:
    app = an_app(idem_store="memory://options", idem_lease=7, idem_on_crash="rerun")

    @app.task(base=IdempotentTask, intent=("a",), lease=2, max_attempts=9, lazy=False, shared=False)
    def pay(a: int) -> None: ...

    found = pay.guard.settings
    assert (found.lease, found.max_attempts, found.on_crash) == (2, 9, "rerun")
    assert pay.guard.options.policy.lease == 2_000_000


def test_a_wrong_option_of_a_task_names_the_task() -> None:
    app = an_app(idem_store="memory://")
    with pytest.raises(ConfigurationError, match=r"shop\.pay: lease cannot be 'long'"):
        app.task(base=IdempotentTask, shared=False, intent=("a",), lease="long", lazy=False, name="shop.pay")(
            body
        )


def test_annotations_are_options() -> None:
    app = an_app(
        idem_store="memory://annotated",
        task_annotations={"shop.pay": {"intent": ("a",), "lease": 3, "must_match": ("b",)}},
    )
    app.Task = IdempotentTask

    @app.task(name="shop.pay", lazy=False, shared=False)
    def pay(a: int, b: int) -> None: ...

    assert pay.guard.settings.lease == 3
    assert pay.idem_declaration.fields == ("a",)
    assert pay.idem_declaration.must_match == ("b",)


# --- how settings are used -------------------------------------------------------------------------


def test_the_policy_is_in_microseconds() -> None:
    chosen = Settings(lease=1.5, result_ttl=2, failure_ttl=3, on_crash="resume", max_attempts=4)
    assert chosen.policy(asks=True) == Policy(1_500_000, 2_000_000, 3_000_000, "resume", True, 4)
    assert chosen.but(failure_ttl=None).policy(asks=False).failure_ttl == 2_000_000


def url_of(app: Celery, store: str = "") -> str:
    return store_of(Settings(store=store), app).url


def test_the_store_is_the_redis_result_backend_unless_it_is_set() -> None:
    app = an_app(result_backend="redis://host/3")
    assert url_of(app) == "redis://host:6379/3"
    assert url_of(app, "redis://other/1") == "redis://other/1"
    for nothing in (None, "rpc://", "db+sqlite://"):
        with pytest.raises(ConfigurationError, match="Set idem_store"):
            url_of(an_app(result_backend=nothing))


def test_the_result_backend_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """CELERY_RESULT_BACKEND wins over the configuration, as in Celery itself."""
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://elsewhere/5")
    assert url_of(an_app()) == "redis://elsewhere:6379/5"
    assert url_of(an_app(result_backend="redis://host/3")) == "redis://elsewhere:6379/5"
    assert url_of(an_app(), "memory://") == "memory://"
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "rpc://")
    with pytest.raises(ConfigurationError, match="idem_store"):
        url_of(an_app(result_backend="redis://host/3"))


def test_the_result_backend_may_come_from_the_command_line(tmp_path: Path) -> None:
    """`celery --result-backend` sets the store: the error message names the URL that did not answer."""
    (tmp_path / "from_outside.py").write_text(
        "from celery import Celery\napp = Celery('from_outside', backend='redis://127.0.0.1:2/1')\n"
    )
    words = [
        "-m",
        "celery",
        "-A",
        "from_outside",
        "--result-backend",
        "redis://127.0.0.1:1/5",
        "idem",
        "stats",
    ]
    told = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "redis://127.0.0.1:1/5 did not answer" in told.stdout + told.stderr
    assert told.returncode == 1


def test_one_store_per_place_and_process() -> None:
    one, other = an_app(idem_store="memory://shared"), an_app(idem_store="memory://shared")
    assert ledger_of(one).store is ledger_of(other).store
    assert ledger_of(one).store is not ledger_of(an_app(idem_store="memory://elsewhere")).store


def test_a_ledger_knows_the_applications_namespace_and_serializers() -> None:
    app = an_app(
        idem_store="memory://",
        idem_namespace="shop",
        idem_max_result_bytes=99,
        result_serializer="pickle",
        accept_content=["application/json", "application/x-python-serialize", "application/x-yaml"],
    )
    ledger = Ledger.from_app(app)
    assert ledger.namespace == "shop"
    assert ledger.codec.serializer == "pickle"
    assert set(ledger.codec.accept) == {"json", "pickle", "yaml"}
    assert ledger.codec.max_bytes == 99
    app = an_app(idem_store="memory://", accept_content=["pickle"], result_accept_content=["json"])
    assert set(Ledger.from_app(app).codec.accept) == {"json"}


def test_every_setting_has_a_default_and_nothing_changes_it() -> None:
    assert settings.PREFIX == "idem_"
    chosen = Settings(lease=1.5)
    assert vars(chosen) == {**settings.DEFAULTS, "lease": 1.5}
    assert len({chosen, Settings(lease=1.5), Settings()}) == 2
    assert chosen.but(audit=False) == Settings(lease=1.5, audit=False) != chosen
    assert chosen != "lease"
    with pytest.raises(AttributeError, match="cannot be changed: lease"):
        chosen.lease = 2.0
    with pytest.raises(TypeError, match="no setting leese"):
        Settings(leese=2.0)
