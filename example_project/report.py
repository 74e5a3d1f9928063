"""Counts the effects of a run by fault, and prints the table."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE
from rich.table import Table

from example_project.callers import Heard
from example_project.faults import Fault
from example_project.stage import Stage


@dataclass(frozen=True)
class Row:
    """One fault in one run."""

    effects: int  # lines in the billing ledger
    exact: bool  # every intent has exactly the lines it means, and there are no others
    executed: int  # deliveries that wrote to the billing service
    replayed: int  # deliveries that were answered from the record
    in_doubt: int  # deliveries that were answered with "in doubt"
    complaints: tuple[str, ...]  # callers that did not get the right answer


def read(stage: Stage, fault: Fault) -> Row:
    """Count one fault: effects in the ledger, deliveries in the workers' journal, the callers' answers."""
    lines = stage.lines(f"{fault.tag}-")
    deliveries = stage.deliveries(f"{fault.tag}-")
    heard = [heard for heard in stage.heard if heard.call.invoice_id.startswith(f"{fault.tag}-")]
    return Row(
        effects=sum(len(numbers) for numbers in lines.values()),
        exact={line: len(numbers) for line, numbers in lines.items()} == fault.meant,
        executed=sum(bool(delivery.writes) for delivery in deliveries),
        replayed=sum(not delivery.writes and delivery.state == "SUCCESS" for delivery in deliveries),
        in_doubt=sum(delivery.error == "OutcomeUnknown" for delivery in deliveries),
        complaints=tuple(_complaints(fault, lines, heard)),
    )


def _complaints(fault: Fault, lines: dict[tuple[str, str], list[int]], heard: list[Heard]) -> list[str]:
    """Return the callers that ended without an answer, with one unknown to the ledger, or with different ones."""
    found = []
    answers: dict[tuple[str, str, str | None], set[str]] = {}
    known = {f"{kind}-{number}" for (kind, _), numbers in lines.items() for number in numbers}
    for one in heard:
        if one.outcome != fault.ends:
            found.append(f"a caller of {one.call.name} for {one.call.invoice_id} ended with: {one.outcome}")
        elif one.answer is not None and not set(one.answer.values()) <= known:
            found.append(
                f"{one.call.name} for {one.call.invoice_id} answered {one.answer}, not in the ledger"
            )
        else:
            intent = (one.call.name, one.call.invoice_id, one.call.occurrence)
            answers.setdefault(intent, set()).add(str(one.answer))
    for (name, invoice_id, _), different in answers.items():
        if len(different) > 1:
            found.append(f"callers of {name} for {invoice_id} got different answers: {sorted(different)}")
    return found


def table(faults: list[Fault], plain: dict[str, Row], guarded: dict[str, Row]) -> Table:
    """Return for each fault the intended effects and the effects of each run, counted at the billing ledger."""
    # Fits 80 columns, which is also the width in a log file.
    result = Table(
        title="Effects, counted at the billing ledger",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    result.add_column("fault", no_wrap=True)
    result.add_column("intents", justify="right")
    result.add_column("effects\nmeant", justify="right")
    result.add_column("plain\nCelery", justify="right")
    result.add_column("celery_idem", justify="right")
    result.add_column("executed/\nreplayed/\nin doubt", justify="right")
    for fault in faults:
        one = guarded[fault.tag]
        result.add_row(
            fault.title,
            str(fault.intents),
            str(sum(fault.meant.values())),
            _marked(plain[fault.tag]),
            _marked(one),
            f"{one.executed}/{one.replayed}/{one.in_doubt}",
        )
    return result


def _marked(row: Row) -> str:
    # A word beside the colour, for logs and for readers who cannot see it.
    return f"[green]{row.effects} ok[/]" if row.exact else f"[red]{row.effects} !![/]"
