"""`planmoe probe` on emulated clusters finds the rates that were asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import ClusterSpec, run_on_cluster
from planmoe_ds.costs import ClusterCosts

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

INTER, INTRA = 400, 2000  # Mbit/s
ATTEMPTS = 3  # a machine with other work slows a rank now and then, and with small messages alone a line gets flat


def probe(counts: tuple[int, ...], folder: Path) -> ClusterCosts:
    spec = ClusterSpec(ranks_per_node=counts, inter=f"{INTER}mbit", intra=f"{INTRA}mbit")
    program = [sys.executable, "-m", "planmoe_ds.cli", "probe", "--refresh", "--json"]
    variables = {"XDG_CACHE_HOME": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    run = run_on_cluster(spec, program, timeout=90, environment=variables)
    if run.skip_reason is not None:
        pytest.skip(run.skip_reason)
    assert run.returncode == 0, run.stderr
    return ClusterCosts.model_validate(json.loads(run.stdout))


@pytest.mark.parametrize("counts", [(2, 2), (3, 1)], ids=str)
def test_rates(counts: tuple[int, ...], tmp_path: Path) -> None:
    """All ranks of a node share its links, so a byte of the busiest rank costs as much as all that go with it."""
    uneven = len(set(counts)) > 1
    intra_ranks, inter_ranks = (max(counts), 1 if uneven else max(counts))
    for _ in range(ATTEMPTS):
        costs = probe(counts, tmp_path)
        assert costs.node_of_rank == [node for node, count in enumerate(counts) for _ in range(count)]
        links = {
            "intra": (costs.intra, INTRA / intra_ranks),
            "inter": (costs.inter, INTER / inter_ranks),
            "intra_while_both": (costs.intra_while_both, INTRA / intra_ranks),
            "inter_while_both": (costs.inter_while_both, INTER / inter_ranks),
        }
        found = {name: 8e-6 / cost.beta_seconds_per_byte / wanted for name, (cost, wanted) in links.items() if cost}
        if len(found) == 4 and min(found.values()) > 0.8 and max(found.values()) < 1.2:
            return
    pytest.fail(f"measured rates over those asked for: {found}")
