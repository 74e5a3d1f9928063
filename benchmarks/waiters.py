"""Measures a hundred callers that wait for one long body: ``python -m benchmarks.waiters --seconds 10,50``.

The servers count commands to the store (``commandstats``) and messages to the broker, for duplicates that reach a
worker and for callers of ``submit`` that wait on receipts. Each number is printed beside its allowed maximum.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import uuid
from pathlib import Path
from typing import Any

from tests.celery.conftest import Kind, start
from tests.celery.waiters import Counter, at_receipts, at_the_worker, most_commands, most_looks, most_returns
from tests.support.servers import RedisServer

LEASE = 30.0  # seconds: the default


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--waiters", type=int, default=100)
    parser.add_argument("--seconds", default="10,50", help="how long the body runs; it gives up after 60")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows there")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    number = options.waiters
    with (
        tempfile.TemporaryDirectory() as folder,
        RedisServer(Path(folder) / "broker") as broker,
        RedisServer(Path(folder) / "store") as store,
    ):
        stage = start(
            Kind("threads", "redis", True, 8),
            broker.url,
            broker.url_for(1),
            Path(folder),
            idem_store=store.url,
            idem_lease=LEASE,
        )
        try:
            for seconds in map(float, options.seconds.split(",")):
                for who, wait, commands, messages in (
                    ("duplicates at the worker", at_the_worker, most_commands, most_returns),
                    ("callers with a receipt", at_receipts, lambda s: 1 + most_looks(s), lambda s: 0),
                ):
                    name = uuid.uuid4().hex
                    cost = wait(
                        stage,
                        lambda: Counter(store, broker),
                        name,
                        number,
                        lambda ran, _, s=seconds: ran >= s,
                    )
                    assert cost.answers == [f"slow {name}"] * (number + 1)
                    rows.append(
                        {
                            "who": who,
                            "waiters": number,
                            "the body's seconds": round(cost.seconds, 1),
                            "commands each": round(cost.commands / number, 1),
                            "at most": commands(cost.seconds),
                            "messages each": round(cost.messages / number, 1),
                            "at most ": messages(cost.seconds),
                        }
                    )
                    print(", ".join(f"{what} {value}" for what, value in rows[-1].items()), flush=True)
        finally:
            stage.worker.kill()
            gc.collect()  # a result unsubscribes at its backend when it is collected, so that must still run
            stage.app.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
