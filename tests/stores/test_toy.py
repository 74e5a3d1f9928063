"""The store on the page "write a store" passes the conformance suite, and is short."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_idem.stores.base import Store
from celery_idem.testing import StoreConformance
from tests.stores.toy import DirectoryStore

HERE = Path(__file__).parent


class TestToy(StoreConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make_store(self) -> Store:
        return DirectoryStore(self.folder)


def test_the_page_shows_it_and_it_is_short() -> None:
    page = (HERE.parents[1] / "docs" / "how-to" / "write-a-store.md").read_text()
    toy = (HERE / "toy.py").read_text()
    assert toy in page
    assert len([line for line in toy.splitlines() if line.strip()]) < 100
