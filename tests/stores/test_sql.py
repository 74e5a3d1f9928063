"""The SQL store, in SQLite and in PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from celery_idem.stores import open_store
from celery_idem.stores.base import Store
from celery_idem.testing import StoreConformance


class TestSqlite(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, tmp_path: Path) -> None:
        self.url = f"sqlite:///{tmp_path}/idem.db"

    def make_store(self) -> Store:
        return open_store(self.url)


@pytest.mark.postgres
class TestPostgresql(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, postgres_url: str) -> None:
        self.url = postgres_url

    def make_store(self) -> Store:
        return open_store(self.url)
