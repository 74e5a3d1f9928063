"""The demonstration: the same traffic with the same faults, once with plain Celery and once with celery_idem.

    python -m example_project.simulate        (or: make demo)

Starts these processes, and stops all of them, also on Ctrl-C: an embedded Valkey (or `IDEM_DEMO_URL`, to use
your own Redis), a billing service, two prefork workers, two orchestrators and an agent.

Exit status:
- 0: with celery_idem every intent has exactly one effect in the billing ledger, and every caller has the right
  answer ("in doubt" where the outcome is unknown).
- 1: that is not so, or a fault did not take place.
- 2: there is no server to run on.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from example_project import report
from example_project.faults import FAULTS, DidNotHappen, Fault
from example_project.processes import Ended, Interrupted, NotInTime, Processes
from example_project.server import NoServer, Server
from example_project.stage import Stage

NAMES = {False: "plain Celery", True: "celery_idem"}


class Progress:
    """Prints what happens. On a terminal it also shows a spinner with the current step."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._began = time.monotonic()
        self._status = self._console.status("starting")

    def __enter__(self) -> Progress:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def now(self, text: str) -> None:
        self._status.update(text)

    def say(self, text: str, style: str = "") -> None:
        self._console.print(
            f"[dim]{time.monotonic() - self._began:5.1f} s[/]  {escape(text)}", style=style, soft_wrap=True
        )

    def show(self, thing: object) -> None:
        self._status.stop()
        self._console.print(thing, soft_wrap=isinstance(thing, str))


def run(stage: Stage, faults: list[Fault], progress: Progress) -> dict[str, report.Row]:
    """Inject every fault, one after the other, and then count the effects."""
    for number, fault in enumerate(faults, 1):
        progress.now(f"{NAMES[stage.guarded]}: {fault.title}")
        fault.run(stage, lambda text: progress.say(f"    {text}", "dim"))
        if armed := stage.armed():
            raise DidNotHappen(f"{fault.title}: the billing service was never asked for {armed}")
        made = sum(len(numbers) for numbers in stage.lines(f"{fault.tag}-").values())
        meant = sum(fault.meant.values())
        progress.say(
            f"{NAMES[stage.guarded]} {number}/{len(faults)}  {fault.title}: {meant} meant, {made} made"
        )
    progress.now(f"{NAMES[stage.guarded]}: stopping")
    stage.stop()
    return {fault.tag: report.read(stage, fault) for fault in faults}


def simulate(processes: Processes, folder: Path, progress: Progress) -> int:
    server = Server(processes, folder)
    faults = [fault for fault in FAULTS if server.is_broker or not fault.needs_redis_broker]
    rows = {}
    for guarded in (False, True):
        progress.now(f"{NAMES[guarded]}: starting a billing service, two workers, two orchestrators")
        rows[guarded] = run(Stage(processes, server, folder / str(guarded), guarded), faults, progress)
    progress.show(report.table(faults, rows[False], rows[True]))
    progress.show(
        "!! marks a count that is not what was meant. A body resumed after a crash is executed again.\n"
    )
    complaints = [complaint for row in rows[True].values() for complaint in row.complaints]
    for complaint in complaints:
        progress.show(f"[red]with celery_idem, {escape(complaint)}[/]")
    if complaints or not all(row.exact for row in rows[True].values()):
        progress.show("[red]FAILED: celery_idem did not keep its promise.[/]")
        return 1
    progress.show(
        "[green]With celery_idem every intent took effect exactly once, and every caller has the right answer.\n"
        "Where the outcome is unknown, the answer is 'in doubt', and nothing ran again.[/]"
    )
    return 0


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="idem-demo-"))
    status = 1
    try:
        with Processes() as processes, Progress() as progress:
            try:
                status = simulate(processes, folder, progress)
            except NoServer as error:
                progress.say(str(error), "red")
                status = 2
            except (Ended, NotInTime, DidNotHappen) as error:
                progress.say(f"FAILED: {error}", "red")
                progress.say(f"the logs are in {folder}")
    except Interrupted as signal_:
        print(f"{signal_}: everything that was started is stopped", file=sys.stderr)
        status = 128 + signal_.signum
    if status != 1:  # otherwise the logs show what failed
        shutil.rmtree(folder, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
