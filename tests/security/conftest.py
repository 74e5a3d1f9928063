"""Two applications that share a store and differ only in their namespace, and a command line for tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_idem import IdempotentTask
from celery_idem.cli import idem

# A text in records and results of the namespace "theirs". Another namespace must never see it.
MARK = "s3cret-of-the-neighbour"


def application(url: str, namespace: str, **conf: Any) -> Celery:
    """Return an application whose results contain the arguments of the calls."""
    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    # All tests of a process share one memory broker, so each application has another queue.
    app.conf.update(
        idem_store=url, idem_namespace=namespace, task_default_queue=f"test-{uuid.uuid4().hex}", **conf
    )

    def pay(customer: str, cents: int = 0) -> str:
        return f"paid {cents} for {customer}: {MARK if namespace == 'theirs' else 'ours'}"

    def login(user: str, token: str, pin: str = "", *more: str) -> str:
        return f"{user} with {token}"

    how: dict[str, Any] = {"base": IdempotentTask, "shared": False, "lazy": False}
    app.task(name="shop.pay", intent=("customer",), must_match=("cents",), **how)(pay)
    app.task(name="shop.login", intent=("user",), secret=("token", "pin", "more"), **how)(login)
    return app


def command_line(app: Celery, *words: str) -> str:
    """Return what ``celery -A shop idem …`` prints, including errors."""
    result = CliRunner().invoke(idem, list(words), obj=CLIContext(app, True, "."))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.fixture(params=["memory", "sqlite", "redis"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store that both applications use."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return f"sqlite:///{tmp_path}/idem.db" if request.param == "sqlite" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def memory_app() -> Callable[..., Celery]:
    """`memory_app(namespace="a", idem_lease=5)` returns an application. Those of one test share a memory store."""
    url = f"memory://{uuid.uuid4().hex}"

    def make(namespace: str = "ours", **conf: Any) -> Celery:
        return application(url, namespace, **conf)

    return make
