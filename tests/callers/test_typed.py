"""The typed decorator at run time. Tests of what a type checker sees are in tests/typing."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from celery_idem import ConfigurationError, IdempotentTask, idempotent_task


@pytest.fixture
def app() -> Celery:
    app = Celery("typed", set_as_current=False)
    app.conf.update(idem_store="memory://typed", task_always_eager=True)
    return app


def test_it_is_an_idempotent_task(app: Celery) -> None:
    class Own(IdempotentTask):
        pass

    ran: list[int] = []

    @idempotent_task(
        app, intent=("number",), must_match="cents", bind=True, base=Own, name="typed.pay", lease=7
    )
    def pay(self: Any, number: int, cents: int = 1) -> int:
        ran.append(number)
        return self.claim.attempt + number

    assert isinstance(app.tasks["typed.pay"], Own)
    assert pay.guard.settings.lease == 7
    assert [pay(1), pay.delay(1).get(), pay.apply_async((1,)).get(), pay.submit(1).result] == [2, 2, 2, 2]
    assert pay.submit(1, cents=2).differs == ("cents",)
    assert ran == [1]


def test_its_mistakes_are_told(app: Celery) -> None:
    def pay(number: int) -> None: ...

    with pytest.raises(ConfigurationError, match="names 'nobody', which is not a parameter"):
        idempotent_task(app, intent=("nobody",), shared=False)(pay).delay(
            1
        )  # declared at first use, as Celery's are
