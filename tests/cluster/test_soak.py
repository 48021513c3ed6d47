"""The soak on a small scale: trouble leaves losses and memory as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import SKIP
from benchmarks.soak import WARM_UP, growth

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(450)
def test_a_short_soak() -> None:
    command = [sys.executable, "benchmarks/soak.py", "--minutes", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode == SKIP:
        pytest.skip(done.stderr)
    assert "RESULT soak_losses_equal=1" in done.stdout, done.stdout + done.stderr


def test_growth_is_seen() -> None:
    assert growth([float(step) for step in range(WARM_UP)] + [100.0] * 300) == 0
    leaking = growth([100.0 + step for step in range(WARM_UP + 300)])
    assert leaking is not None
    assert leaking > 0.3
    assert growth([100.0] * 2 * WARM_UP) == 0
    assert growth([100.0] * (2 * WARM_UP - 1)) is None
