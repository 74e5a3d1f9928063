"""The messages of the command line after a wrong command or without a store. See ``test_messages``."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_idem import Ledger
from celery_idem.cli import idem
from tests.docs.test_messages import SECRETS, Shop, run
from tests.operators.intents import in_doubt


def line(app: Celery, *words: str, **options: Any) -> tuple[int, str]:
    """Run a command and return its exit status and output. An exception other than SystemExit fails the test."""
    result = CliRunner().invoke(idem, list(words), obj=CLIContext(app, True, "."), **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


class Operator:
    """An operator of a shop with two intents. ``{doubtful}`` and ``{settled}`` in a command stand for their keys."""

    def __init__(self) -> None:
        self.shop = Shop()
        task = self.shop.task()
        run(task, "settled")
        self.keys = {"settled": task.intent_key("settled"), "doubtful": task.intent_key("doubtful")}
        in_doubt(Ledger.from_app(self.shop.app), self.keys["doubtful"])

    def say(self, words: tuple[str, ...], **options: Any) -> tuple[int, str]:
        filled = (re.sub(r"\{(\w+)\}", lambda found: self.keys[found[1]], word) for word in words)
        return line(self.shop.app, *filled, **options)


SURE = ("--evidence=seen", "--yes")
NO_KEY = "shop.charge:" + "0" * 32

WRONG: list[tuple[tuple[str, ...], int, tuple[str, ...]]] = [
    (("show", NO_KEY), 1, (f"no intent {NO_KEY} in memory://", "result_ttl", "never ran", "`idem list`")),
    (("show", "nonsense"), 1, ("no intent nonsense", "`idem list`")),
    (
        ("show", "shop.cha"),
        1,
        ("Several intents begin with 'shop.cha'", "such as shop.charge:", "more of the key"),
    ),
    (("show", "\udcff"), 1, ("'\\udcff' is not valid text", "Copy it again")),
    (("show",), 2, ("Missing argument 'KEY'",)),
    (("frobnicate",), 2, ("No such command 'frobnicate'", "--help")),
    (("list", "--state", "doubtful"), 2, ("'doubtful' is not one of 'running'", "'in_doubt'")),
    (("list", "--limit", "0"), 2, ("'--limit'", "0 is not in the range")),
    (("list", "--older-than", "-1"), 2, ("'--older-than'", "'-1' is not a duration", "15m, 2h, 1d")),
    (("list", "--since", "yesterday"), 2, ("'--since'", "'yesterday' is not a time", "how long ago")),
    (("list", "--scope", ""), 1, ("scope is empty",)),
    (
        ("list", "--task", "shop.chrage"),
        1,
        ("No such intents", "no guarded task shop.chrage", "It has: shop.charge"),
    ),
    (("resolve", "{doubtful}", *SURE), 2, ("--happened JSON", "--not-happened")),
    (("resolve", "{doubtful}", "--happened=1", "--not-happened", *SURE), 2, ("Give one of",)),
    (("resolve", "{doubtful}", "--happened=inv_7", *SURE), 2, ("JSON", "inv_7", "--happened '\"inv_7\"'")),
    (("resolve", "{doubtful}", "--not-happened", "--evidence= "), 2, ("Write what you saw", "--evidence '")),
    (
        ("resolve", "{doubtful}", "--not-happened"),
        1,
        ("Nothing was changed", "--evidence answers the question"),
    ),
    (
        ("resolve", "{doubtful}", "--not-happened", "--evidence=x"),
        1,
        ("RUNS it", "Nothing was changed", "--yes"),
    ),
    (
        ("resolve", "{doubtful}", "--not-happened", "--fence=12", *SURE),
        1,
        ("{doubtful}", "fence 12 then", "Nothing was written", "Look again", "idem show"),
    ),
    (("resolve", "{settled}", "--not-happened", *SURE), 1, ("{settled} is succeeded", "nothing to resolve")),
    (("resolve", NO_KEY, "--not-happened", *SURE), 1, (f"no intent {NO_KEY}",)),
    (("forget", "{settled}"), 1, ("every proof", "next call RUNS", "Nothing was changed")),
    (("forget", NO_KEY, "--yes"), 1, (f"no intent {NO_KEY}",)),
    (("forget",), 2, ("Give a KEY", "--state")),
    (("forget", "{settled}", "--state=failed"), 2, ("not both",)),
    (("forget", "--task=shop.charge"), 2, ("--state",)),
    (("forget", "--state=in_doubt"), 2, ("'in_doubt' is not one of 'failed'",)),
    (
        ("forget", "--state=succeeded"),
        1,
        ("1 intents", "every proof", "Type 1 to go on", "Nothing was changed"),
    ),
    (("resolve",), 2, ("Give a KEY", "--from FILE")),
    (("resolve", "{doubtful}", "--from=-"), 2, ("the file says which",)),
    (("resolve", "{doubtful}", "{settled}", "--fence=1"), 2, ("--fence is about one",)),
    (("key", "shop.chrage", "[]"), 1, ("no guarded task shop.chrage", "It has: shop.charge")),
    (("key", "shop.charge"), 2, ("Give one call, or two",)),
    (("key", "shop.charge", "{{x"), 2, ("A call is JSON, and {{x is not",)),
    (("key", "shop.charge", "5"), 2, ("JSON object of keyword arguments, or a list", "5 is neither")),
    (
        ("key", "shop.charge", '{{"custmer": 1}}'),
        1,
        ("does not fit the signature of shop.charge", "'customer'"),
    ),
    (("key", "shop.charge", "[NaN]"), 1, ("'customer'", "NaN")),
    (("key", "shop.charge", "[1]", "--scope=a", "--scope=b"), 2, ("at most 1 of --scope",)),
    (("schema", "mysql"), 1, ("no table for 'mysql'", "postgresql, sqlite")),
    (("copy", "mongodb://me:hunter2@x", "memory://y", "--yes"), 1, ("no store for mongodb://", "redis://")),
    (
        ("copy", "redis://:hunter2@127.0.0.1:1/0", "memory://", "--yes"),
        1,
        ("redis://127.0.0.1:1/0 did not answer",),
    ),
    (("reconcile", "--arguments=/nowhere", "--yes"), 2, ("'/nowhere'", "No such file")),
    (("reconcile", "--arguments=-", "--yes"), 1, ("Line 1 is not", '"kwargs"', 'not an object with a "key"')),
    (("metrics", "--port=99999"), 2, ("'--port'", "99999 is not in the range")),
    (
        ("metrics", "--port=1", "--address=nowhere.invalid"),
        1,
        ("Cannot listen on", "nowhere.invalid:1", "--address"),
    ),
]


@pytest.mark.parametrize(("words", "status", "said"), WRONG, ids=[" ".join(words) for words, _, _ in WRONG])
def test_the_command_line_says_what_was_wrong(
    words: tuple[str, ...], status: int, said: tuple[str, ...]
) -> None:
    operator = Operator()
    words = tuple(word.replace("{{", "{").replace("}}", "}") for word in words)
    given = "[1]\n" if "--arguments=-" in words else ""
    code, output = operator.say(words, input=given)
    wanted = [
        re.sub(r"\{(settled|doubtful)\}", lambda f: operator.keys[f[1]], w).replace("{{", "{") for w in said
    ]
    assert code == status, output
    assert [word for word in wanted if word not in output] == [], output
    assert [word for word in SECRETS if word in output] == [], output
    assert operator.say(("list", "--json"))[1].count("\n") == 2  # nothing was changed


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, output = line(Shop().app, "metrics", f"--port={port}")
    assert code == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in output
    assert "Give another --port" in output


STORELESS = ("list", "stats", "audit", "shadow", "show x", "forget x --yes", "reconcile --yes")


@pytest.mark.parametrize("words", STORELESS)
def test_a_store_that_is_away(words: str) -> None:
    code, output = line(Shop(idem_store="redis://:hunter2@127.0.0.1:1/0").app, *words.split())
    assert code == 1
    assert "redis://127.0.0.1:1/0 did not answer" in output
    assert "`idem doctor` checks the store" in output
    assert "hunter2" not in output


def test_doctor_says_it_of_a_store_that_is_away() -> None:
    code, output = line(Shop(idem_store="redis://:hunter2@127.0.0.1:1/0").app, "doctor")
    assert code == 1
    assert "store-down: redis://127.0.0.1:1/0" in output
    assert "-> Start it, or set idem_store to where it is. " in output
    assert "hunter2" not in output


@pytest.mark.parametrize("words", [("list",), ("doctor",)])
def test_no_store_and_a_misspelt_setting(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = line(Celery("none", set_as_current=False), *words)
    assert code == 1
    assert "needs a store" in output
    assert "Set idem_store" in output
    slip = Celery("slip", set_as_current=False, idem_leese=5)
    monkeypatch.setattr(_state, "default_app", slip)  # as in a Django project
    code, output = line(slip, *words)
    assert code == 1
    assert "Did you mean idem_lease?" in output
    assert "Did you name" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["idem", "list"], "Did you name your application? celery -A proj idem"),
        (["-A", "nowhere", "idem", "list"], "The module nowhere was not found"),
        (["-A", "wrong", "idem", "list"], "wrong.pay is declared with IdempotentTask but without an intent"),
    ],
    ids=["none", "unknown", "wrong"],
)
def test_no_application_or_a_wrong_one(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(
        "from celery import Celery\n"
        "from celery_idem import IdempotentTask\n"
        "app = Celery('wrong', backend='redis://127.0.0.1:1/0')\n"
        "@app.task(base=IdempotentTask, name='wrong.pay')\n"
        "def pay(customer): ...\n"
    )
    told = subprocess.run(
        [sys.executable, "-m", "celery", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert told.returncode != 0
    assert said in told.stdout + told.stderr
    assert "Traceback" not in told.stdout + told.stderr
