"""Fixtures for pytest-celery with this project's image as the worker, on a Redis and on a RabbitMQ broker.

The fixtures of pytest-celery that are overridden here would pull the newest images, build a worker image of 1 GB and
leave volumes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import docker
import pytest
import pytest_docker_tools.wrappers.container as tools
from pytest_celery import (
    CELERY_RABBITMQ_BROKER,
    CELERY_REDIS_BACKEND,
    CELERY_REDIS_BROKER,
    RABBITMQ_CONTAINER_TIMEOUT,
    REDIS_CONTAINER_TIMEOUT,
    CeleryBackendCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestSetup,
    CeleryWorkerContainer,
    RabbitMQContainer,
    RedisContainer,
)
from pytest_docker_tools import build, container, fxtr

from tests.containers import shop
from tests.containers.test_compose import ROOT
from tests.support.servers import free_port


# -- the engine -----------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def docker_client(docker_engine: str) -> docker.DockerClient:
    """The client of the Docker engine. Without an engine the test skips, or fails under REQUIRE_DOCKER=1."""
    return docker.from_env()


@pytest.fixture(scope="session", autouse=True)
def published_ports() -> Any:
    """Make pytest-docker-tools use published ports, also if the tests run in a container.

    There it would use the containers' own addresses and ports. pytest-celery asks it for the port only and connects to
    localhost, which needs published ports.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "tests_inside_container", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def django_settings() -> Any:
    """Configure Django's settings, which other tests import.

    When pytest-celery ends a backend, it inspects every object of the process. Settings that are not configured raise.
    """
    from django.conf import UserSettingsHolder, global_settings, settings

    before = vars(settings)["_wrapped"]
    settings._wrapped = UserSettingsHolder(global_settings)  # MonkeyPatch would read them first and fail
    yield
    settings._wrapped = before


# -- brokers and the result backend ---------------------------------------------------------------------
# The images' VOLUME would leave an anonymous volume each time, so tmpfs replaces it. The ports are fixed here, because
# ports that the engine selects change when a container restarts.
def _redis(image: str, ports: str, command: str) -> Any:
    return container(
        image=image,
        ports=fxtr(ports),
        command=fxtr(command),
        network="{default_pytest_celery_network.name}",
        tmpfs={"/data": ""},
        wrapper_class=RedisContainer,
        timeout=REDIS_CONTAINER_TIMEOUT,
    )


default_redis_broker = _redis("redis:7", "default_redis_broker_ports", "default_redis_broker_command")
default_redis_backend = _redis("redis:7", "default_redis_backend_ports", "default_redis_backend_command")
default_rabbitmq_broker = container(
    image="rabbitmq:3",
    ports=fxtr("default_rabbitmq_broker_ports"),
    network="{default_pytest_celery_network.name}",
    tmpfs={"/var/lib/rabbitmq": ""},
    wrapper_class=RabbitMQContainer,
    timeout=RABBITMQ_CONTAINER_TIMEOUT,
)


@pytest.fixture
def default_redis_broker_ports() -> dict[str, tuple[str, int]]:
    return {"6379/tcp": ("127.0.0.1", free_port())}


@pytest.fixture
def default_redis_backend_ports() -> dict[str, tuple[str, int]]:
    return {"6379/tcp": ("127.0.0.1", free_port())}


@pytest.fixture
def default_rabbitmq_broker_ports() -> dict[str, tuple[str, int]]:
    return {"5672/tcp": ("127.0.0.1", free_port())}


# pytest-celery makes its lists from a set, so their order and the names of the tests would differ between runs.
@pytest.fixture(params=[CELERY_REDIS_BROKER, CELERY_RABBITMQ_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> CeleryTestBroker:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[CELERY_REDIS_BACKEND])
def celery_backend(request: pytest.FixtureRequest) -> CeleryTestBackend:
    return request.getfixturevalue(request.param)


# -- the worker -----------------------------------------------------------------------------------------
# The image of the project's Dockerfile, which users build too.
celery_base_worker_image = build(path=str(ROOT), tag="celery-idem-test-worker")


@pytest.fixture
def default_worker_app_module() -> ModuleType:
    return shop


@pytest.fixture
def default_worker_env(
    celery_worker_cluster_config: dict[str, Any], celery_backend_cluster: CeleryBackendCluster
) -> dict[str, str]:
    destination = celery_backend_cluster[0].config(vhost=shop.DATABASE)["url"]
    return CeleryWorkerContainer.initial_env(celery_worker_cluster_config, {"SHOP": destination})


@pytest.fixture
def default_worker_command() -> list[str]:
    # Four processes: the tests hold three of them.
    return CeleryWorkerContainer.command("--concurrency", "4", "--without-gossip", "--without-mingle")


@pytest.fixture
def destination(celery_setup: CeleryTestSetup) -> shop.Shop:
    """The worker's destination, reached from outside the containers."""
    assert celery_setup.backend is not None
    return shop.Shop(celery_setup.backend.config(vhost=shop.DATABASE)["host_url"])
