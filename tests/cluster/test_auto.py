"""comm "auto" on an emulated cluster: the links are measured, the all-to-all that sends least is taken and named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.cluster import ClusterSpec, run_on_cluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

ON_RANK = Path(__file__).with_name("auto_choice.py")


@pytest.mark.parametrize(("exactness", "expected"), [("reordered", "dedup"), ("exact", "direct")])
def test_two_slow_nodes(tmp_path: Path, exactness: str, expected: str) -> None:
    spec = ClusterSpec.even(2, 2, "100mbit", "2gbit")
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    run = run_on_cluster(spec, [sys.executable, str(ON_RANK), exactness], 120, environment=environment)
    if run.skip_reason is not None:
        pytest.skip(run.skip_reason)
    assert run.returncode == 0, run.stderr
    name, reason = run.stdout.strip().split("|")
    assert name == expected
    assert "predicted" in reason
    assert ("dedup is left out" in reason) == (exactness == "exact")
    assert list(tmp_path.glob("planmoe/links-*.json"))
