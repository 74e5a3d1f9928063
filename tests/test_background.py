"""Slow readings: no caller waits long, each gets what is known so far, and one reading runs at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from celery_idem.operate import background as module
from celery_idem.operate.background import Background
from tests.support.waiting import wait_for

LONG, SHORT = 20.0, 0.01


class Source:
    """A reading that stops half way until `go` is set."""

    def __init__(self) -> None:
        self.begun = 0
        self.go = threading.Event()
        self.fails = False

    def __call__(self) -> Iterator[str]:
        self.begun += 1
        number = self.begun
        yield f"half of {number}"
        assert self.go.wait(LONG)
        if self.fails:
            raise OSError("the store is away")
        yield f"all of {number}"


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.go.set()


def whole(background: Background[str]) -> Callable[[], bool]:
    return lambda: background.look().whole is not None


def test_a_quick_reading_is_waited_for_and_kept_while_it_is_fresh(source: Source) -> None:
    source.go.set()
    background = Background(source, fresh=LONG, patience=LONG)
    assert [background.look().whole for _ in range(3)] == ["all of 1"] * 3
    background.outdate()
    assert background.look().whole == "all of 2"


def test_nobody_waits_for_a_slow_one_and_everybody_sees_how_far_it_is(source: Source) -> None:
    background = Background(source, fresh=LONG, patience=SHORT)
    wait_for(lambda: background.look().unfinished == "half of 1", LONG, "the first half")
    assert background.look().whole is None
    assert source.begun == 1  # although several callers look
    source.go.set()
    wait_for(whole(background), LONG, "the whole")
    assert background.look().unfinished is None


def test_the_last_whole_one_stands_until_the_next_is_whole(source: Source) -> None:
    source.go.set()
    background = Background(source, fresh=0.0, patience=SHORT)
    wait_for(whole(background), LONG, "the first reading")
    first = background.look()
    source.go.clear()
    wait_for(lambda: (background.look().unfinished or "") > "half of 1", LONG, "the next reading")
    later = background.look()
    assert (later.whole or "").startswith("all of")
    assert later.began >= first.began
    began = later.began
    source.go.set()
    wait_for(lambda: background.look().began > began, LONG, "the next whole one")


def test_after_a_slow_reading_comes_a_pause_also_for_who_asks_to_read_anew(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    background = Background(source, fresh=0.0, patience=SHORT)
    wait_for(lambda: background.look().unfinished, LONG, "the reading")
    now += 1.0  # the reading is slow
    source.go.set()
    wait_for(whole(background), LONG, "the whole")
    background.outdate()
    now += module.PAUSE - 0.1
    background.look()
    assert source.begun == 1
    now += 0.2
    background.look()
    assert source.begun == 2


def test_a_reading_that_fails_is_told_and_tried_again(source: Source) -> None:
    source.go.set()
    source.fails = True
    background = Background(source, fresh=LONG, patience=LONG)
    assert isinstance(background.look().error, OSError)
    source.fails = False
    latest = background.look()
    assert (latest.whole, latest.error) == ("all of 2", None)
