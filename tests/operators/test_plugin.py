"""The pytest plugin in the test suite of another project: which tests pass, and which fail with --idem-duplicate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_servers import NO_PLUGINS

ROOT = Path(__file__).parents[2]

SUITE = """
import pytest
from celery import Celery
from celery_idem import Happened, IdempotentTask, Ledger, NotHappened

app = Celery("theirs", broker="memory://", backend="cache+memory://")
app.conf.task_always_eager = True
EFFECTS = []


def happened(task, customer, **kwargs):
    return Happened("asked") if EFFECTS[0].count("asked", customer) else NotHappened()


def make(name, **options):
    @app.task(name=name, shared=False, bind=True, **options)
    def task(self, customer):
        EFFECTS[0].add(name, customer)
        return f"{name} {customer}"


make("plain")
make("guarded", base=IdempotentTask, intent=("customer",))
make("asked", base=IdempotentTask, intent=("customer",), reconcile=happened)
make("careless", base=IdempotentTask, intent=("customer",), on_crash="rerun")


@app.task(name="stepped", shared=False, bind=True, base=IdempotentTask, intent=("customer",), on_crash="resume")
def stepped(self, customer):
    self.step("one", lambda: EFFECTS[0].add("one", customer))
    self.step("two", lambda: EFFECTS[0].add("two", customer))
    return customer


@app.task(name="failing", shared=False, base=IdempotentTask, intent=("customer",))
def failing(customer):
    EFFECTS[0].add("failing", customer)
    raise ValueError(customer)


@pytest.fixture
def idem_app():
    return app


@pytest.fixture(autouse=True)
def effects(idem_effects, idem_store):
    EFFECTS[:] = [idem_effects]
    return idem_effects


@pytest.mark.parametrize("name", ["plain", "guarded", "asked", "careless"])
def test_task(name, effects):
    assert app.tasks[name].delay("a").get() == f"{name} a"
    assert effects.count(name, "a") >= 1


def test_steps(effects):
    assert app.tasks["stepped"].delay("a").get() == "a"


def test_error(effects):
    with pytest.raises(ValueError):
        app.tasks["failing"].delay("a").get()


def test_the_clock(idem_clock, effects):
    task = app.tasks["guarded"]
    task.delay("a")
    task.delay("a")
    assert effects.count("guarded", "a") == 1
    idem_clock.advance(2 * 86_400)  # the outcome has expired
    task.delay("a")
    assert effects.count("guarded", "a") == 2
    effects.forget("guarded", "a")


def test_the_store_is_empty():
    assert list(Ledger.from_app(app).list()) == []
"""


def outcome(folder: Path, *options: str) -> dict[str, str]:
    """Run the suite and return the outcome of each test."""
    (folder / "test_theirs.py").write_text(SUITE)
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rA",
        *NO_PLUGINS,
        *options,
        "test_theirs.py",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    lines = [
        line.split() for line in done.stdout.splitlines() if line.startswith(("PASSED", "FAILED", "ERROR"))
    ]
    results = {line[1].partition("::")[2]: line[0] for line in lines if "::" in line[1]}  # not lines of a log
    assert results, done.stdout + done.stderr
    (folder / "output").write_text(done.stdout)
    return results


def test_without_the_option_nothing_is_duplicated(tmp_path: Path) -> None:
    results = outcome(tmp_path)
    assert set(results.values()) == {"PASSED"}
    assert len(results) == 8


def test_with_it_only_tasks_that_repeat_their_effect_fail(tmp_path: Path) -> None:
    results = outcome(tmp_path, "--idem-duplicate")
    wrong = {name for name, result in results.items() if result == "ERROR"}
    assert wrong == {"test_task[plain]", "test_task[careless]"}
    assert not [name for name, result in results.items() if result == "FAILED"]
    output = (tmp_path / "output").read_text()
    assert "plain a (2 times)" in output
    assert "careless a" in output


def test_the_plugin_is_registered() -> None:
    from importlib.metadata import entry_points

    if not [point for point in entry_points(group="pytest11") if point.value == "celery_idem.testing.plugin"]:
        pytest.fail("reinstall the package: its entry points are older than pyproject.toml")
