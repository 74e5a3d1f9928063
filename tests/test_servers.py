"""The helpers of the other tests: servers keep and lose data as they should, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import celery
import psutil
import psycopg
import pytest
import redis

from tests.support.effects import Effects, Gate
from tests.support.processes import Program
from tests.support.servers import ServerMissingError, _on_path
from tests.support.waiting import wait_for
from tests.support.workers import ROOT

# For a pytest run inside a test: no plugins that take seconds to import, or have fixtures with our names.
NO_PLUGINS = [
    word
    for name in (
        "valkey",
        "cacheprovider",
        "langsmith_plugin",
        "schemathesis",
        "docker_tools",
        "celery",
        "anyio",
    )
    for word in ("-p", f"no:{name}")
]


def test_wait_for_ends_with_what_it_waited_for():
    with pytest.raises(AssertionError, match=r"waited 0.05 s for: rain; last seen: 0"):
        wait_for(lambda: 0, timeout=0.05, message=lambda: "rain")


def test_a_missing_program_says_what_to_install():
    with pytest.raises(ServerMissingError, match="install no-such-package"):
        _on_path("no-such-program", "no-such-package")


@pytest.mark.parametrize(("demand", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_missing_server_is_a_skip_or_where_demanded_a_failure(demand, outcome, tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(redis_url): pass\n")
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *NO_PLUGINS, str(tmp_path)],
        env={"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "CELERY_IDEM_REQUIRE_SERVERS": demand},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert outcome in run.stdout, run.stdout + run.stderr


@pytest.mark.redis
@pytest.mark.parametrize("processes", [0, 1])
def test_an_interrupted_run_leaves_no_server(redis_server, tmp_path, processes):
    """Tested with SIGTERM. SIGINT has the same handler."""
    (tmp_path / "test_it.py").write_text(
        "import time\n"
        "def test_it(start_redis, tmp_path):\n"
        "    server = start_redis()\n"
        f"    with open({str(tmp_path / 'pid')!r}, 'w') as file:\n"
        "        file.write(f'{server.pid}.')\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    run = Program(
        [sys.executable, "-m", "pytest", *NO_PLUGINS, "-n", str(processes), str(tmp_path)],
        log=tmp_path / "log",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    try:
        written = tmp_path / "pid"
        wait_for(lambda: written.exists() and written.read_text().endswith("."), message=run.log_tail)
        server = psutil.Process(int(written.read_text()[:-1]))
        run.send(signal.SIGTERM)
        wait_for(lambda: not run.alive, message=run.log_tail)
        left = server.is_running()
        if left:
            server.kill()
        assert not left, run.log_tail()
    finally:
        run.kill()


def test_a_program_that_ends_at_once_shows_its_log(tmp_path):
    program = Program([sys.executable, "-c", "print('no such thing'); exit(3)"], log=tmp_path / "log")
    with pytest.raises(AssertionError, match=r"(?s)status 3.*no such thing"):
        program.wait_until_ready(lambda: False, timeout=30)


def test_kill_leaves_no_descendants(tmp_path):
    code = "import os, time; os.fork() or os.fork(); print('up', flush=True); time.sleep(60)"
    program = Program([sys.executable, "-c", code], log=tmp_path / "log")
    wait_for(lambda: program.log_text().count("up") == 3, message=program.log_tail)
    family = [p.pid for p in program.descendants()]
    assert len(family) == 2
    program.kill()
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in family)


def test_descendants_of_a_dead_program_are_found(tmp_path):
    """A test may kill a worker with os.kill. The worker's pool must not outlive the test."""
    code = "import os, time; os.fork(); print('up', flush=True); time.sleep(60)"
    program = Program([sys.executable, "-c", code], log=tmp_path / "log")
    wait_for(lambda: program.log_text().count("up") == 2, message=program.log_tail)
    [child] = program.descendants()
    os.kill(program.pid, 9)
    wait_for(lambda: not program.alive)
    assert program.descendants() == [child]
    program.kill()
    wait_for(lambda: not child.is_running() or child.status() == "zombie")


@pytest.mark.redis
def test_redis_is_empty_for_each_test(redis_url):
    client = redis.Redis.from_url(redis_url)
    assert client.dbsize() == 0
    client.set("left", "over")


@pytest.mark.redis
def test_redis_is_empty_for_each_test_again(redis_url):
    assert redis.Redis.from_url(redis_url).dbsize() == 0


@pytest.mark.valkey
def test_valkey(valkey_url):
    client = redis.Redis.from_url(valkey_url)
    assert client.dbsize() == 0
    assert client.info("server")["server_name"] == "valkey"


@pytest.mark.redis
@pytest.mark.parametrize(("appendonly", "kept"), [(True, b"1"), (False, None)])
def test_redis_killed_and_restarted(start_redis, appendonly, kept):
    server = start_redis(appendonly=appendonly)
    port, pid = server.port, server.pid
    redis.Redis.from_url(server.url).set("a", 1)
    server.kill()
    assert not server.alive
    with pytest.raises(redis.ConnectionError):
        redis.Redis.from_url(server.url).ping()
    server.restart()
    assert server.port == port
    assert server.pid != pid
    assert redis.Redis.from_url(server.url).get("a") == kept


@pytest.mark.redis
def test_redis_frozen(start_redis):
    server = start_redis()
    client = redis.Redis.from_url(server.url, socket_timeout=0.3)
    server.pause()
    with pytest.raises(redis.TimeoutError):
        client.ping()
    server.resume()
    wait_for(client.ping)


@pytest.mark.rabbitmq
def test_rabbitmq_listens_on_loopback_alone(rabbitmq):
    """The port for other nodes listens on loopback only, too."""
    listening = [c for c in psutil.net_connections("inet") if c.status == "LISTEN"]
    [pid] = {c.pid for c in listening if c.laddr.port == rabbitmq.port}
    assert {c.laddr.ip for c in listening if c.pid == pid} == {"127.0.0.1"}


@pytest.mark.postgres
def test_postgres_keeps_what_was_committed_through_a_crash(postgres, postgres_url):
    with psycopg.connect(postgres_url) as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS n")
    postgres.kill()
    postgres.restart()
    with psycopg.connect(postgres_url) as connection:
        assert connection.execute("SELECT n FROM t").fetchall() == [(1,)]


def test_effects_are_counted_over_processes(effects):
    code = f"""
from tests.support.effects import Effects
for _ in range(50):
    Effects({str(effects.path)!r}).add("a")
"""
    writers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    effects.add("b", cents=5)
    assert effects.counts() == {"a": 100, "b": 1}
    assert effects.of("b") == [{"intent": "b", "pid": os.getpid(), "cents": 5}]
    assert Effects(effects.path).count() == 101


def test_a_closed_gate_ends_the_wait(gate):
    with pytest.raises(AssertionError, match="the gate"):
        gate.wait(timeout=0.05)
    gate.open()
    Gate(gate.path).wait(timeout=0)


WORKER_APP = """
import os
from celery import Celery
from tests.support.effects import Effects, Gate

app = Celery("app", broker=os.environ["BROKER"], backend=os.environ["BACKEND"])
app.conf.broker_connection_retry_on_startup = True


@app.task
def note(intent):
    Effects("effects.jsonl").add(intent)
    Gate("gate").wait()
    return intent
"""


@pytest.fixture
def app_file(tmp_path, monkeypatch):
    (tmp_path / "worker_app.py").write_text(WORKER_APP)
    return "worker_app:app"


@pytest.mark.redis
def test_a_worker_runs_a_task(start_worker, app_file, redis_url, effects, gate):
    gate.open()
    worker = start_worker(app_file, env={"BROKER": redis_url, "BACKEND": redis_url})
    assert len(worker.child_pids()) == 1
    client = celery.Celery("client", broker=redis_url, backend=redis_url)
    assert client.send_task("worker_app.note", ["x"]).get(timeout=30) == "x"
    assert effects.counts() == {"x": 1}
    worker.stop()
    assert worker.exit_code == 0


def test_a_worker_that_cannot_start_shows_its_log(start_worker):
    with pytest.raises(AssertionError, match="The module no_such_app was not found"):
        start_worker("no_such_app")
