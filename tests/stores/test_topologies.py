"""Redis behind Sentinel and in a cluster: the suite, and what happens under load while roles and slots move."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_idem.intent import MICROSECONDS
from celery_idem.stores import open_store
from celery_idem.stores.base import Store
from celery_idem.testing import StoreConformance
from tests.conftest import running
from tests.stores.servers import Cluster, Watched

pytestmark = pytest.mark.redis

MINE = b"owner-mine--"
DAY = 86_400 * MICROSECONDS


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with running(lambda: Watched(tmp_path_factory.mktemp("watched"))) as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(lambda: Cluster(tmp_path_factory.mktemp("cluster"))) as servers:
        yield servers


class TestSentinel(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, watched: Watched) -> None:
        self.url = watched.url

    def make_store(self) -> Store:
        return open_store(self.url)


class TestCluster(StoreConformance):
    @pytest.fixture(autouse=True)
    def _url(self, cluster: Cluster) -> None:
        self.url = cluster.url

    def make_store(self) -> Store:
        return open_store(self.url)
