"""The processes of one run: a billing service, two prefork workers, two orchestrators."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from example_project import billing_client, witness
from example_project.callers import Call, Caller, Heard
from example_project.processes import Processes, wait_for
from example_project.server import PREFIX, Server

ROOT = Path(__file__).resolve().parent.parent  # the checkout, which need not be installed
START = 30.0  # seconds for a process to come up: a worker takes 3, a busy machine may take ten times that
SEEN = 20.0  # seconds until a fault shows its effect
WORKERS = 2
CHILDREN = 4  # per worker: enough that nothing queues behind a stalled task
# Seconds until Redis redelivers. Shorter than the stall of `faults.still_running`, longer than other tasks
# take.
VISIBILITY = 3


class Stage:
    """The processes of one run, with celery_idem if `guarded`."""

    def __init__(self, processes: Processes, server: Server, folder: Path, guarded: bool) -> None:
        folder.mkdir()
        self.guarded = guarded
        self.server = server
        self.heard: list[Heard] = []  # every caller's final answer, over all faults
        self._folder = folder
        self._processes = processes
        self._prefix = f"{PREFIX}-{'guarded' if guarded else 'plain'}"
        self._ledger = folder / "ledger.sqlite3"
        self._journal = folder / "witness.jsonl"
        self._env = {
            **os.environ,
            "IDEM_DEMO_URL": server.url,
            "IDEM_DEMO_GUARD": "1" if guarded else "0",
            "IDEM_DEMO_PREFIX": self._prefix,
            "IDEM_DEMO_VISIBILITY": str(VISIBILITY),
            "IDEM_DEMO_WITNESS": str(self._journal),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder),  # killed processes leave their temporary folders behind
        }
        self._billing = self._start_billing()
        self._workers = [self._start_worker(number) for number in range(1, WORKERS + 1)]
        self._orchestrators = [self._start_caller("orchestrator") for _ in range(2)]
        wait_for(self._all_ready, START, f"workers and orchestrators are ready, see {folder}")

    # -- for the faults

    def arm(self, path: str, invoice_id: str, fault: str, seconds: float = 0) -> None:
        """Make the billing service do `fault` on the next request for that path and invoice."""
        billing_client.arm(path, invoice_id, fault, seconds, base=self._env["IDEM_DEMO_BILLING"])

    def armed(self) -> list[str]:
        """Return the faults that have not taken place yet."""
        return billing_client.armed(base=self._env["IDEM_DEMO_BILLING"])

    def ask(self, calls: list[Call], by: int = 1) -> list[tuple[Caller, Call]]:
        """Let `by` orchestrators dispatch all calls at once. Pass the result to `hear`."""
        asked = [(caller, call) for call in calls for caller in self._orchestrators[:by]]
        for number, (caller, call) in enumerate(asked):
            caller.tell({"id": number, **asdict(call)})
        return asked

    def hear(self, asked: list[tuple[Caller, Call]]) -> None:
        """Wait for all answers. Raises `NotInTime`."""
        for caller, _ in asked:
            said = caller.hear()
            self.heard.append(Heard(asked[said["id"]][1], said["outcome"], said["answer"]))

    def start_agent(self, seed: str, role: str = "agent") -> Caller:
        return self._start_caller(role, "--seed", seed)

    def kill_child(self, path: str, invoice_id: str) -> None:
        """Wait until a worker child has called the billing service for that invoice, and SIGKILL it."""
        wait_for(lambda: self._calls(path, invoice_id), SEEN, f"a worker calls {path} for {invoice_id}")
        wait_for(lambda: self.lines(invoice_id), SEEN, f"the ledger has a line for {invoice_id}")
        os.kill(self._calls(path, invoice_id)[0], signal.SIGKILL)

    # -- for the report

    def lines(self, invoice_prefix: str) -> dict[tuple[str, str], list[int]]:
        """Return the numbers of the ledger's lines by kind and invoice id."""
        found: dict[tuple[str, str], list[int]] = {}
        query = "SELECT kind, invoice_id, number FROM lines WHERE invoice_id LIKE ? || '%' ORDER BY number"
        with closing(sqlite3.connect(f"{self._ledger.as_uri()}?mode=ro", uri=True, timeout=5)) as db:
            for kind, invoice_id, number in db.execute(query, (invoice_prefix,)):
                found.setdefault((kind, invoice_id), []).append(number)
        return found

    def deliveries(self, invoice_prefix: str) -> list[witness.Delivery]:
        """Return the deliveries that the workers recorded."""
        every = witness.deliveries(self._journal)
        return [delivery for delivery in every if delivery.invoice_id.startswith(invoice_prefix)]

    def stop(self) -> None:
        """Wait until the broker is empty, so that no effect can follow, then stop all processes."""
        if self.server.is_broker:
            wait_for(
                lambda: not self.server.messages_left(self._prefix), SEEN, "the broker has no message left"
            )
        self._processes.stop(self._workers, grace=5)
        self._processes.stop([*(caller.process for caller in self._orchestrators), self._billing], grace=2)

    # -- starting

    def _start_billing(self) -> subprocess.Popen[str]:
        log = self._folder / "billing.log"
        command = ["-m", "example_project.billing_service", "--ledger", str(self._ledger), "--port", "0"]
        process = self._start(command, "billing")
        wait_for(lambda: "listening on" in log.read_text(), START, f"the billing service listens, see {log}")
        self._env["IDEM_DEMO_BILLING"] = re.findall(r"listening on (\S+)", log.read_text())[0]
        return process

    def _start_worker(self, number: int) -> subprocess.Popen[str]:
        command = ["-m", "celery", "-A", "example_project.app", "worker", "-l", "INFO"]
        command += ["-n", f"worker{number}@%h", "--concurrency", str(CHILDREN)]
        # The two workers need no gossip, and searching for other workers costs a second of the demo.
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        return self._start(command, f"worker{number}")

    def _start_caller(self, role: str, *arguments: str) -> Caller:
        return Caller(self._start(["-m", f"example_project.{role}", *arguments], role, talk=True))

    def _start(self, arguments: list[str], name: str, talk: bool = False) -> subprocess.Popen[str]:
        return self._processes.start(
            [sys.executable, *arguments], self._folder / f"{name}.log", self._env, talk=talk
        )

    def _all_ready(self) -> bool:
        self._processes.check()
        ready = sum(event["event"] == "ready" for event in witness.read(self._journal))
        return bool(ready == len(self._workers) + len(self._orchestrators))

    def _calls(self, path: str, invoice_id: str) -> list[int]:
        """Return the ids of the processes that made this call, in order."""
        return [
            event["pid"]
            for event in witness.read(self._journal)
            if event["event"] == "call" and (event["path"], event["invoice_id"]) == (path, invoice_id)
        ]
