"""The commands about the set-up: doctor, audit, shadow, metrics, schema and copy."""

from __future__ import annotations

import click

from celery_idem.cli.screen import Screen, cannot_listen, command, yes_option
from celery_idem.engine.ledger import Ledger
from celery_idem.operate import copying
from celery_idem.operate.copying import Copied
from celery_idem.operate.operators import Operator
from celery_idem.stores import open_store, sql_statements

IN_STORE = "(the store)"
"""Value of --against and --save without a FILE."""


@command("doctor")
@click.option(
    "--pool", default="", help="The pool of your workers (--pool), if the configuration does not say."
)
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@click.option(
    "--against",
    is_flag=False,
    flag_value=IN_STORE,
    metavar="[FILE]",
    help="Report only what changes for open and remembered intents since the last deployment. The declarations of that "
    "deployment are read from the store, where its workers wrote them, or from FILE, which --save wrote.",
)
@click.option(
    "--save",
    is_flag=False,
    flag_value=IN_STORE,
    metavar="[FILE]",
    help="Keep the declarations of this release, in the store or in FILE.",
)
def doctor(
    screen: Screen, operator: Operator, pool: str, strict: bool, against: str | None, save: str | None
) -> None:
    """Find problems of this set-up, and the setting to change.

    Exit status 1 if there is an error (with --strict: a warning), for use in CI.
    """
    from celery_idem.operate.doctor import declared, examine, gather, worst_first

    if against is None:
        found = examine(gather(operator.app, pool=pool))
    else:
        before = declared.of_stores(operator) if against == IN_STORE else declared.read_file(against)
        found = worst_first(declared.changes(operator, before))
    if save == IN_STORE:
        for ledger in operator.ledgers():
            declared.keep(ledger, operator.tasks())
    elif save is not None:
        declared.write_file(save, operator)
    if screen.as_json:
        screen.json([finding._asdict() for finding in found])
    else:
        for finding in found:
            screen.state(finding.severity, f"{finding.code}: {finding.where}")
            screen.line(f"    {finding.wrong}")
            screen.line(f"    -> {finding.change}")
        screen.line(f"Findings: {len(found)}." if found else "No findings.")
    fatal = ("error", "warning") if strict else ("error",)
    if any(finding.severity in fatal for finding in found):
        raise SystemExit(1)


@command("audit")
@click.option("--task", help="Only this task.")
@click.option(
    "--within",
    type=click.FloatRange(min=0.0),
    default=300.0,
    show_default=True,
    help="Seconds between retries of one action.",
)
def audit(screen: Screen, operator: Operator, task: str | None, within: float) -> None:
    """Find keys that may be too narrow (drift) or too wide (spread), and effects that may have happened twice (double).

    Drift: calls that differ in one value of the intent only, so that retries may run again. Spread: replays whose
    free arguments differ, so that a second action may not have run.
    """
    from celery_idem.operate.audit import audit as look

    found = look(operator.list(None, task), operator.tasks(), within)
    if screen.as_json:
        screen.json([{**suspicion._asdict(), "says": suspicion.says} for suspicion in found])
        return
    for suspicion in found:
        screen.state("warning" if suspicion.likely else "note", f"{suspicion.kind}: {suspicion.task}")
        screen.line(f"    {suspicion.says}")
        screen.line(f"    for example {', '.join(suspicion.example)}")
    if not found:
        screen.line("Nothing suspicious. (Only records with digests are looked at: idem_audit = True.)")


@command("shadow")
@click.option("--clear", is_flag=True, help="Remove the shadow records.")
@yes_option
def shadow(screen: Screen, operator: Operator, clear: bool, yes: bool) -> None:
    """Report what shadow mode (idem_shadow) has seen, and which tasks are ready for their guard."""
    from celery_idem.operate.audit import readiness

    ledgers = [ledger.shadow() for ledger in operator.ledgers()]
    if clear:
        screen.confirm("All shadow records will be removed. Records of real guards stay. Go on?", yes)
        removed = sum(ledger.forget(entry.key) for ledger in ledgers for entry in ledger.list())
        screen.answer({"removed": removed}, f"{removed} shadow records removed.")
        return
    report = readiness((entry for ledger in ledgers for entry in ledger.list()), operator.tasks())
    if screen.as_json:
        screen.json(
            [
                {
                    "task": task.task,
                    "verdict": task.verdict,
                    "why": task.why,
                    "calls": task.calls,
                    "intents": task.intents,
                    "would": {would.name.lower(): number for would, number in task.would.items()},
                    "differs": dict(task.differs),
                }
                for task in report
            ]
        )
        return
    for task in report:
        counts = (f"{number} {what.name.lower()}" for what, number in sorted(task.would.items()))
        would = ", ".join(counts) or "nothing"
        said = f"{task.task}: {task.calls} calls of {task.intents} intents; would: {would}"
        screen.state(task.verdict, said)
        screen.line(f"    {task.why}")
    if not report:
        screen.line(
            "No shadow records. Set idem_shadow = True (or shadow=True on a task) and run your workers."
        )


@command("metrics")
@click.option("--port", type=click.IntRange(0, 65_535), default=9808, show_default=True)
@click.option("--address", default="127.0.0.1", show_default=True)
@click.option(
    "--every",
    type=click.FloatRange(min=0.0),
    default=30.0,
    show_default=True,
    help="Seconds between two readings of the store.",
)
@click.option("--once", is_flag=True, help="Print the metrics and exit.")
def metrics(screen: Screen, operator: Operator, port: int, address: str, every: float, once: bool) -> None:
    """Serve metrics for Prometheus: counts of intents by state, and the workers' counts of events.

    For the workers' counts, set the same PROMETHEUS_MULTIPROC_DIR for the workers and for this command.
    """
    from celery_idem.telemetry.prometheus import PATIENCE, exporter_registry

    registry = exporter_registry(operator.app, every, None if once else PATIENCE)
    import prometheus_client

    if once:
        click.echo(prometheus_client.generate_latest(registry).decode(), nl=False)
        return
    try:
        _, thread = prometheus_client.start_http_server(port, address, registry)
    except OSError as error:
        raise cannot_listen(address, port, error) from None
    click.echo(f"http://{address}:{port}/metrics", err=True)
    thread.join()


@command("schema")
@click.argument("dialect", default="postgresql")
def schema(screen: Screen, operator: Operator, dialect: str) -> None:
    """Print the SQL that creates the SQL store's table, for postgresql or sqlite."""
    text = sql_statements.schema(dialect)
    screen.answer({"dialect": dialect, "sql": text}, text)


@command("copy")
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@yes_option
def copy(screen: Screen, operator: Operator, source: str, target: str, yes: bool) -> None:
    """Copy all records from one store (its URL) to another. It may be stopped and run again."""
    screen.confirm(
        "Records of this application's namespaces will be written to the target. A newer record there stays; an "
        "older one is updated. Copy once while the workers run, and once more after they have stopped. Go on?",
        yes,
    )

    def progress(counts: Copied) -> None:
        if not screen.as_json:
            click.echo(f"\r{counts.seen} seen, {counts.written} written", nl=False, err=True)

    total = Copied()
    for namespace, ledger in {ledger.namespace: ledger for ledger in operator.ledgers()}.items():
        old = Ledger(open_store(source), namespace, ledger.codec, ledger.result_ttl)
        new = Ledger(open_store(target), namespace, ledger.codec, ledger.result_ttl)
        total = Copied(*map(sum, zip(total, copying.copy(old, new, progress), strict=True)))
    if not screen.as_json:
        click.echo(err=True)
    screen.answer(
        total._asdict(),
        f"{total.seen} records seen: {total.written} written, {total.there} there already, "
        f"{total.expired} expired, {total.unreadable} unreadable.",
    )
