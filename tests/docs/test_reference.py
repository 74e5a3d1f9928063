"""The hand-written pages of the reference agree with the code. The other pages are made from docstrings."""

from __future__ import annotations

import ast
import logging
import re

import pytest

import celery_idem
from celery_idem.core import errors
from celery_idem.core.model import State
from celery_idem.engine import events
from celery_idem.integration.options import WORDS
from celery_idem.integration.settings import DEFAULTS, NAMES
from celery_idem.stores import schemes
from tests.docs.page import ROOT

REFERENCE = ROOT / "docs" / "reference"


def rows(page: str) -> list[list[str]]:
    """Return the cells of every row of every table on a page. `\\|` does not separate cells."""
    lines = (REFERENCE / page).read_text().splitlines()
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if line.startswith("| ")
    ]


SETTINGS = {row[0].strip("`"): row[1] for row in rows("settings.md") if row[0].startswith("`idem_")}


def test_every_setting_is_there_and_no_other() -> None:
    assert list(SETTINGS) == [f"idem_{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_its_default_is_the_true_one(name: str) -> None:
    said, default = SETTINGS[f"idem_{name}"], DEFAULTS[name]
    literal = re.fullmatch(r"`([^`]+)`", said)
    if literal:
        assert ast.literal_eval(literal[1]) == default
    else:  # in words: "the result backend, …", "as `idem_result_ttl`"
        assert default in ("", None)


def test_every_option_of_a_task_is_there() -> None:
    words = {row[0].strip("`") for row in rows("settings.md")}
    assert set(WORDS) <= words


def test_every_kind_of_store_is_there() -> None:
    text = (REFERENCE / "settings.md").read_text()
    spellings = {"unix", "postgresql+psycopg"}  # accepted as in redis-py and SQLAlchemy, but not recommended
    assert [scheme for scheme in schemes() if f"{scheme}://" not in text and scheme not in spellings] == []


def test_no_store_is_there_that_cannot_be_opened() -> None:
    said = {
        cell.split("://")[0].strip("` ")
        for row in rows("settings.md")
        for cell in row[0].split(",")
        if "://" in cell
    }
    assert said <= set(schemes())


def test_every_event_is_there_with_its_level() -> None:
    said = {row[0].strip("`"): row[1] for row in rows("events.md") if row[0].startswith("`")}
    assert said == {kind: logging.getLevelName(level) for kind, level in events.LEVELS.items()}


def test_the_drawing_has_every_state() -> None:
    drawn = set(re.findall(r">([A-Z][A-Z ]+)<", (ROOT / "docs" / "img" / "states.svg").read_text()))
    assert drawn == {state.name.replace("_", " ") for state in State}


def test_every_error_is_there() -> None:
    text = (REFERENCE / "errors.md").read_text()
    assert [name for name in errors.__all__ if name not in text] == []


def test_every_public_name_has_a_place() -> None:
    text = "".join(page.read_text() for page in REFERENCE.glob("*.md"))
    documented = [name for name in celery_idem.__all__ if f"::: celery_idem.{name}\n" in text]
    assert sorted({*documented, *errors.__all__}) == sorted(celery_idem.__all__)
