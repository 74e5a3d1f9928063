"""`docker-compose.yml` starts as a user runs it, and a task that is sent twice has one effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.servers import free_port
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]

# Seconds. Pulling missing images takes the longest. Building and starting take about 40.
UP_WITHIN = 600
ANSWER_WITHIN = 60

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(UP_WITHIN + 300)]

Compose = Callable[..., str]

SEND_INVOICE = """
import json
from dataclasses import asdict
from example_project.orchestrator import dispatch
call = {"customer_id": "acme", "invoice_id": "7", "cents": 4200}
answers = [dispatch("billing.send_invoice", kwargs={**call, "note": note}) for note in ("Hello", "Hi")]
print(json.dumps([asdict(answer) for answer in answers]))
"""

COUNT_INVOICES = """
import sqlite3
ledger = sqlite3.connect("/ledger/ledger.sqlite3")
print(ledger.execute("SELECT COUNT(*) FROM lines WHERE kind = 'invoice'").fetchone()[0])
"""


@pytest.fixture
def ports() -> dict[str, str]:
    return {"IDEM_REDIS_PORT": str(free_port()), "IDEM_RABBITMQ_PORT": str(free_port())}


@pytest.fixture
def compose(docker_compose: list[str], ports: dict[str, str]) -> Iterator[Compose]:
    """`compose("ps", "-q")` runs in a project for this test, which is removed with its volumes and images."""
    project = f"celery-idem-test-{uuid.uuid4().hex[:8]}"

    def run(*words: str, timeout: float = 120, check: bool = True) -> str:
        done = subprocess.run(
            [*docker_compose, "-p", project, *words],
            cwd=ROOT,
            env={**os.environ, **ports, "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0")},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{words}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    try:
        yield run
    finally:
        print(run("logs", "--no-color", "--tail", "40", check=False))  # pytest shows it if the test fails
        run("down", "--volumes", "--rmi", "local", "--timeout", "5")


def test_a_task_goes_through_the_composed_services_once(compose: Compose, ports: dict[str, str]) -> None:
    compose("up", "--detach", "--build", timeout=UP_WITHIN)
    worker = compose("ps", "-q", "worker").strip()
    wait_for(
        lambda: _health(worker) == "healthy",
        120,
        lambda: f"the worker to be healthy, it is {_health(worker)}",
    )

    # An orchestrator outside the containers uses the published ports and knows only the task's name.
    answers = subprocess.run(
        [sys.executable, "-c", SEND_INVOICE],
        cwd=ROOT,
        env={
            **os.environ,
            "IDEM_DEMO_BROKER_URL": f"amqp://guest:guest@127.0.0.1:{ports['IDEM_RABBITMQ_PORT']}//",
            "IDEM_DEMO_URL": f"redis://127.0.0.1:{ports['IDEM_REDIS_PORT']}/0",
        },
        capture_output=True,
        text=True,
        timeout=ANSWER_WITHIN,
    )
    assert answers.returncode == 0, answers.stderr
    first, second = json.loads(answers.stdout)
    assert first["outcome"] == "done", first
    assert first["answer"] == {"number": "invoice-1"}
    assert second == first
    assert compose("exec", "-T", "billing", "python", "-c", COUNT_INVOICES).strip() == "1"

    # The file's comments promise these settings of Redis.
    redis = ("exec", "-T", "redis", "redis-cli", "config", "get")
    assert compose(*redis, "maxmemory-policy").split() == ["maxmemory-policy", "noeviction"]
    assert compose(*redis, "appendonly").split() == ["appendonly", "yes"]


def _health(container: str) -> str:
    words = ["docker", "inspect", "--format", "{{.State.Status}} {{.State.Health.Status}}", container]
    state = subprocess.run(words, capture_output=True, text=True, timeout=30).stdout.split()
    return state[-1] if state[:1] == ["running"] else f"not running: {state}"
