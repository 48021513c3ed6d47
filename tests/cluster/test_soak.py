"""The soak on a small scale: trouble leaves losses and memory as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import SKIP
from benchmarks.soak import growth

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_short_soak() -> None:
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode == SKIP:
        pytest.skip(done.stderr)
    assert "RESULT soak_losses_equal=1" in done.stdout, done.stdout + done.stderr


def test_growth_is_seen() -> None:
    assert growth([500.0] * 20 + [100.0] * 80) == 0
    assert growth([100.0 + step for step in range(100)]) > 0.3
