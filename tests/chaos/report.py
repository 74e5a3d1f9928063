"""Reports a run: lines while it runs, a table at the end, a page with a picture, and JSON."""

from __future__ import annotations

import html
import io
import json
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tests.chaos.clerk import Settled
from tests.chaos.count import KINDS, Verdict
from tests.chaos.picture import picture
from tests.chaos.plan import FAULTS, Plan

Lines = Sequence[Mapping[str, Any]]

QUIET_EVERY = 10.0  # seconds between two lines of progress if the output is no terminal


@dataclass(frozen=True)
class Run:
    """The data of a report. `starts` says how often each worker was started."""

    plan: Plan
    replay: str
    began: float
    start: float
    took: float
    verdict: Verdict
    effects: Lines
    requests: Lines
    answers: Lines
    faults: Lines
    settled: Sequence[Settled]
    reconciled: int
    starts: Mapping[str, int]
    alarms: int
    stories: Mapping[str, Sequence[str]]

    @property
    def summary(self) -> dict[str, Any]:
        """The figures, as plain JSON values."""
        verdict = self.verdict
        doubtful = {str(a["intent"]) for a in self.answers if a["told"] == "in doubt"}
        return {
            "seed": self.plan.seed,
            "replay": self.replay,
            "python": platform.python_version(),
            "seconds": round(self.took, 1),
            "intents": verdict.intents,
            "callers": verdict.calls,
            "calls": verdict.messages,
            "effects": verdict.effects,
            "effects_per_intent": {str(n): count for n, count in sorted(verdict.per_intent.items())},
            "violations": {kind: verdict.of(kind) for kind in KINDS},
            "answers": dict(verdict.told),
            "ticks": verdict.ticks,
            "told_in_doubt": len(doubtful),
            "settled_by_reconcile": self.reconciled,
            "settled_by_operator": dict(Counter(one.what for one in self.settled)),
            "requests_voided": sum(request["told"].get("refused") == "void" for request in self.requests),
            "requests_repeated": sum(bool(request["told"].get("repeated")) for request in self.requests),
            "stale_settles": self.alarms,
            "faults": {kind: self.faults_of(kind) for kind in FAULTS},
            "faults_missed": sum("failed" in fault for fault in self.faults),
            "fates": dict(Counter(intent.fate for intent in self.plan.intents() if intent.fate)),
            "worker_starts": dict(self.starts),
        }

    def faults_of(self, kind: str) -> int:
        return sum(fault["intent"] == kind and "failed" not in fault for fault in self.faults)


class Screen:
    """Prints lines of progress. On a terminal one status line shows the current state."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._status = self._console.status("starting")
        self._quiet_until = 0.0

    def __enter__(self) -> Screen:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def now(self, text: str) -> None:
        if self._console.is_terminal:
            self._status.update(escape(text))
        elif time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + QUIET_EVERY
            self.say(text)

    def say(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True)

    def tell(self, run: Run) -> None:
        """Print the table, the violations and their stories, and the verdict."""
        self._status.stop()
        self._console.print(table(run))
        verdict = run.verdict
        for violation in verdict.violations[:20]:
            self._console.print(
                f"[red]{violation.kind}[/]  {violation.ref}  {escape(violation.what)}", soft_wrap=True
            )
        if len(verdict.violations) > 20:
            self.say(f"… and {len(verdict.violations) - 20} more, in the report")
        for ref, lines in run.stories.items():
            self._console.print(f"\n[bold]The story of {escape(ref)}[/]")
            for line in lines:
                self.say(f"  {line}")
        if verdict.kept:
            self._console.print(
                "[green]Every intent took effect exactly once, and every caller has the right answer.[/]"
            )
        else:
            self._console.print(f"[red]FAILED.[/] To run the same plan: {escape(run.replay)}", soft_wrap=True)


def table(run: Run) -> Table:
    """Return the table of results: first the promises, then the faults."""
    summary, verdict = run.summary, run.verdict
    result = Table(title=f"{run.plan.seconds / 60:g} minutes of chaos, seed {run.plan.seed}", box=SIMPLE)
    result.title_justify = "left"
    result.add_column("what", no_wrap=True)
    result.add_column("count", justify="right", no_wrap=True)
    result.add_column("")
    result.add_row("intents", f"{verdict.intents:,}")
    result.add_row("callers", f"{verdict.calls:,}", f"with {verdict.messages:,} calls through all doors")
    result.add_row(
        "effects, at the destination", f"{verdict.effects:,}", f"with {verdict.ticks:,} of two beats"
    )
    for kind, words in KINDS.items():
        count = verdict.of(kind)
        # A word as well as a colour, for logs and for readers who cannot see the colour.
        result.add_row(words, str(count), "[red]FAILED[/]" if count else "[green]ok[/]")
    result.add_section()
    by_operator = sum(summary["settled_by_operator"].values())
    result.add_row("intents a caller found in doubt", f"{summary['told_in_doubt']:,}")
    result.add_row("settled by asking the destination", f"{run.reconciled:,}", "reconcile")
    result.add_row("settled by a person", f"{by_operator:,}", _counts(summary["settled_by_operator"]))
    result.add_row("late requests it refused", f"{summary['requests_voided']:,}", "by their fence")
    result.add_row("repeats it recognised", f"{summary['requests_repeated']:,}", "by their downstream_key")
    result.add_row("outcomes that came too late", f"{run.alarms:,}", "stale_settle")
    result.add_section()
    for kind in run.plan.kinds:
        result.add_row(f"fault: {kind}", f"{run.faults_of(kind):,}")
    for fate, count in sorted(summary["fates"].items()):
        result.add_row(f"planned: {fate} its effect", f"{count:,}")
    result.add_row("workers started", f"{sum(run.starts.values()):,}", _counts(run.starts))
    return result


def _counts(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in numbers.items())


def write(run: Run, folder: Path) -> Path:
    """Write the page, the picture and the figures into `folder`. Return the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = picture(run)
    (folder / "chaos.svg").write_text(drawn)
    figures = {
        **run.summary,
        "plan": asdict(run.plan),
        "violations_in_full": [asdict(violation) for violation in run.verdict.violations],
        "operator": [one._asdict() for one in run.settled],
    }
    (folder / "chaos.json").write_text(json.dumps(figures, indent=1))
    page = folder / "chaos.html"
    page.write_text(_page(run, drawn))
    return page


def _page(run: Run, drawn: str) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(table(run))
    stories = "".join(
        f"<h2>{html.escape(ref)}</h2><pre>{html.escape(chr(10).join(lines))}</pre>"
        for ref, lines in run.stories.items()
    )
    verdict = "kept" if run.verdict.kept else "NOT kept"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>Chaos, seed {run.plan.seed}: {verdict}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem }}
pre {{ overflow-x: auto }}</style>
<h1>Promises {verdict}</h1>
{drawn}
<pre>{html.escape(console.export_text())}</pre>
<p>To run the same plan: <code>{html.escape(run.replay)}</code></p>
{stories}
</html>
"""
