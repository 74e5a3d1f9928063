"""One action has one key and two actions never share a key, in every process. The test prints its seed."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

from tests.support.workers import ROOT

pytest.importorskip("celery.utils.annotations", reason="Celery before 5.5 does not support models")

COUNT = 250
"""Number of tasks. They take about three seconds on one core, with about seven thousand calls."""


def test_signatures_and_models_made_at_random_from_two_processes() -> None:
    seed = secrets.randbelow(10**9)
    print("seed", seed)
    words = [sys.executable, "-m", "tests.proof.identity", "--seed", str(seed), "--count", str(COUNT)]
    processes = [
        subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        for hash_seed in ("1", "4242")
    ]
    try:
        (one, why), (other, _) = (process.communicate(timeout=100) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), why[-3000:]
    assert one == other, "another key in another process"
    assert len(one.split()) > 4 * COUNT, "hardly any two calls differed"
