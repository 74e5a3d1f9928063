"""The alert rules of ``docs/ops``: each fires when it should, and the commands that it names can be run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from celery import Celery

from celery_idem import Ledger
from celery_idem.core.model import MICROSECONDS, Record, State
from celery_idem.engine.entries import WAITING, Entry, Tally, tallied
from tests.conftest import missing
from tests.operators.conftest import Idem
from tests.operators.intents import claimed, suspected
from tests.operators.shop import send_invoice

OPS = Path(__file__).parents[2] / "docs" / "ops"
TASK = "shop.send_invoice"


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load((OPS / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def events(kind: str, values: str) -> tuple[str, str]:
    return f'celery_idem_events_total{{task="{TASK}",kind="{kind}"}}', values


def oldest(state: str, values: str) -> tuple[str, str]:
    return f'celery_idem_oldest_seconds{{task="{TASK}",state="{state}"}}', values


# The series with a sample each minute, the minute at which it is evaluated, and the alert that fires (or None).
SCENES: dict[str, tuple[list[tuple[str, str]], int, str | None]] = {
    "in doubt": ([oldest("in_doubt", "840+60x30")], 8, "IdemInDoubt"),
    "lapsed, and no delivery comes": ([oldest("lapsed", "840+60x30")], 8, "IdemInDoubt"),
    "in doubt for some minutes": ([oldest("in_doubt", "0+60x12")], 12, None),
    "running for hours": ([oldest("running", "7200+60x30")], 30, None),
    "the first double": ([events("stale_settle", "0 0 0 1 1 1")], 5, "IdemDoubleRun"),
    # This is why the counters begin at 0.
    "the first double, of a counter that begins at 1": ([events("stale_settle", "_ _ _ 1 1 1")], 5, None),
    "a store that fails": ([events("store_error", "0+10x30")], 30, "IdemStoreErrors"),
    "a store that failed once": ([events("store_error", "0 0 1 1 1 1 1 1 1 1 1 1")], 11, None),
    "a run without a guard": ([events("unguarded", "0 0 1")], 3, "IdemUnguarded"),
    "the exporter reads nothing": ([("celery_idem_store_up", "1 1 0x20")], 10, "IdemStoreDown"),
    "other values": ([events("mismatch", "0+1x30")], 30, "IdemMismatches"),
    "a caller in a loop": (
        [events("replayed", "0+600x40"), events("settled", "0x40")],
        40,
        "IdemReplayStorm",
    ),
    "an ordinary day": (
        [
            *(events(kind, "0x60") for kind in ("stale_settle", "store_error", "unguarded", "mismatch")),
            events("settled", "0+600x60"),
            events("replayed", "0+60x60"),
            oldest("succeeded", "80000x60"),
            ("celery_idem_store_up", "1x60"),
        ],
        60,
        None,
    ),
}


def promtool(*words: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        missing("promtool, from the package prometheus")
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def fired(scenes: dict[str, tuple[list[tuple[str, str]], int, str | None]], tmp_path: Path) -> None:
    """Let promtool evaluate the shipped rules on the scenes, and compare the alerts that fire."""
    tests = [
        {
            "name": name,
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in given],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
                }
            ],
        }
        for name, (given, minute, alert) in scenes.items()
    ]
    path = tmp_path / "scenes.yml"
    path.write_text(yaml.safe_dump({"rule_files": [str(OPS / "alerts.yml")], "tests": tests}))
    promtool("test", "rules", str(path))


def test_every_alert_fires_when_it_should(tmp_path: Path) -> None:
    assert {alert for _, _, alert in SCENES.values() if alert} == set(alerts())
    fired(SCENES, tmp_path)


def test_the_dashboards_queries_are_queries(tmp_path: Path) -> None:
    dashboard = json.loads((OPS / "grafana-dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [
        {"record": f"q{n}", "expr": query.replace("$__rate_interval", "5m").replace("$task", ".*")}
        for n, query in enumerate(asked)
    ]
    path = tmp_path / "queries.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_the_alert_the_dashboard_and_the_command_mean_the_same_by_waiting() -> None:
    text = (OPS / "alerts.yml").read_text() + (OPS / "grafana-dashboard.json").read_text().replace('\\"', '"')
    asked = re.findall(r'state=~"([^"]*)"', text)
    assert len(asked) == 3
    assert {tuple(one.split("|")) for one in asked} == {WAITING}


def test_a_doubt_that_is_asked_about_again_and_again_does_not_stay_young() -> None:
    """Each question to the destination writes the record. The alert uses the time since the intent is in doubt."""
    record = Record(state=State.IN_DOUBT, fence=1 * MICROSECONDS)
    entry = Entry(f"{TASK}:{7:032x}", record, stamp=1000 * MICROSECONDS, now=1001 * MICROSECONDS)
    assert tallied([entry]) == {(TASK, "in_doubt"): Tally(1, 1000.0)}


@pytest.mark.parametrize("name", alerts())
def test_what_an_alert_says_to_do_can_be_done(
    name: str, app: Celery, ledger: Ledger, idem: Idem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that an alert names runs, and it lists the intents of the alert."""
    claimed(ledger, send_invoice.intent_key("lapsed", 7), lease=0)
    suspected(ledger, send_invoice.intent_key("twice", 7))
    says = alerts()[name]["annotations"]["what_to_do"].replace("{{ $labels.task }}", TASK)
    for command in re.findall(r"celery -A proj idem ([^;,.]*(?:\.\w[^;,.]*)*)", says):
        words = shlex.split(command.split(" says")[0])
        done = idem(*words)
        assert done.exit_code == 0 or words == ["doctor"], done.output
        shown = {"IdemInDoubt": "lapsed", "IdemDoubleRun": "succeeded"}.get(name, "")
        assert done.output.startswith(shown), done.output
