"""Which answers are owed: what Celery does after the settlement, and what recovery can find out about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from celery_idem import IdempotentTask
from celery_idem.integration import answers, placing


def application(backend: str | None, **conf: Any) -> Celery:
    app = Celery("owed", broker="memory://", backend=backend, set_as_current=False)
    app.conf.update(idem_store="memory://owed", **conf)
    return app


def pay(n: int) -> int:
    return n


KINDS = {
    "redis://": (True, True, True),
    "cache+memory://": (True, True, False),
    "db+sqlite://": (True, True, True),
    "file:///tmp": (True, True, True),
    "rpc://": (True, False, True),
    "disabled://": (False, False, True),
    "no.such.module:Backend": (False, False, False),
}


@pytest.mark.parametrize("url", KINDS)
def test_what_a_result_backend_does_with_answers(url: str, tmp_path: Path) -> None:
    app = application(url.replace("/tmp", str(tmp_path)))
    task = app.task(base=IdempotentTask, name="pay", intent=("n",))(pay)
    assert tuple(answers.kind_of(task)) == KINDS[url]


@pytest.mark.parametrize("kind", [staticmethod, classmethod, None])
def test_an_authors_after_return_is_called_as_before(kind: Any) -> None:
    seen: list[Any] = []

    class Reports(IdempotentTask):
        def after_return(self, *args: Any) -> None:
            seen.append((self, args))

    if kind is not None:
        Reports.after_return = kind(lambda *args: seen.append(args))  # type: ignore[method-assign]
    app = application(None)
    task = app.task(base=Reports, name="pay", intent=("n",))(pay)
    task.apply((1,)).get()
    status, value, _, args, kwargs, einfo = seen[0][-6:] if kind is not None else seen[0][1]
    assert (status, value, args, kwargs, einfo) == ("SUCCESS", 1, (1,), {}, None)
    task.after_return("SUCCESS", 1, "some id", (1,), {}, None)  # an author may call it
    assert len(seen) == 2


def test_what_celery_never_answers_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "OWED_KEPT", 3)
    for n in range(10):
        placing.owe(f"never {n}", lambda: None)
    assert len(placing._owed) <= 3
    placing._owed.clear()
