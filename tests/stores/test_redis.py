"""The Redis store, against redis-server and against Valkey."""

from __future__ import annotations

import pytest

from celery_idem.stores import open_store
from celery_idem.stores.base import Store
from celery_idem.testing import StoreConformance

OWNER = b"owner-mine--"


class TestRedis(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, redis_url: str) -> None:
        self.url = redis_url

    def make_store(self) -> Store:
        return open_store(self.url)


class TestValkey(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, valkey_url: str) -> None:
        self.url = valkey_url

    def make_store(self) -> Store:
        return open_store(self.url)
