"""Links of the emulated cluster carry what was asked for, no more and no less."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.cluster import ClusterSpec, run_on_cluster

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(330)]

TRAFFIC = Path(__file__).with_name("traffic.py")
INTER, INTRA = 200, 800  # Mbit/s
TWO_BY_TWO = ClusterSpec.even(2, 2, f"{INTER}mbit", f"{INTRA}mbit")
ATTEMPTS = 5  # a machine with other work slows a flow now and then; nothing makes one too fast


def flow_spans(spec: ClusterSpec, senders: str, receivers: str, megabytes: str) -> list[tuple[float, float]]:
    """Start and end of each flow, in seconds."""
    run = run_on_cluster(spec, [sys.executable, str(TRAFFIC), senders, receivers, megabytes], timeout=60)
    if run.skip_reason is not None:
        pytest.skip(run.skip_reason)
    assert run.returncode == 0, run.stderr
    return [(start, end) for start, end in json.loads(run.stdout)]


def check_flows(senders: str, receivers: str, wanted: list[float]) -> None:
    """Each flow of about a second, all at once, has the wanted Mbit/s within 15 %."""
    sizes = [rate / 10 for rate in wanted]
    for _ in range(ATTEMPTS):
        spans = flow_spans(TWO_BY_TWO, senders, receivers, ",".join(map(str, sizes)))
        rates = [size * 8 / (end - start) for size, (start, end) in zip(sizes, spans, strict=True)]
        assert all(rate < 1.15 * ask for rate, ask in zip(rates, wanted, strict=True)), f"{rates} of {wanted}"
        if all(rate > 0.85 * ask for rate, ask in zip(rates, wanted, strict=True)):
            return
    pytest.fail(f"{rates} Mbit/s, asked for {wanted}")


def check_sum(spec: ClusterSpec, senders: str, receivers: str, megabytes: float) -> None:
    """All flows together have the inter-node rate within 15 %."""
    for _ in range(ATTEMPTS):
        starts, ends = zip(*flow_spans(spec, senders, receivers, f"{megabytes}"), strict=True)
        rate = len(starts) * megabytes * 8 / (max(ends) - min(starts))
        assert rate < 1.15 * INTER
        if rate > 0.85 * INTER:
            return
    pytest.fail(f"{rate} Mbit/s together, asked for {INTER}")


def test_between_nodes() -> None:
    check_flows("0", "2", [INTER])


def test_inside_a_node() -> None:
    check_flows("0", "1", [INTRA])


def test_both_classes_at_once_do_not_slow_each_other() -> None:
    check_flows("0,1", "2,0", [INTER, INTRA])


def test_a_card_sends_and_receives_at_full_rate() -> None:
    check_flows("0,2", "2,0", [INTER, INTER])


def test_flows_share_the_card_of_their_senders() -> None:
    check_sum(TWO_BY_TWO, "0,1", "2,3", 15)


def test_flows_share_the_card_of_their_receiver() -> None:
    check_sum(ClusterSpec.even(3, 1, f"{INTER}mbit", None), "1,2", "0,0", 15)


def test_unrated_links_are_faster() -> None:
    for _ in range(ATTEMPTS):
        spans = flow_spans(ClusterSpec.even(2, 2, None, None), "0,1", "2,0", "40")
        rates = [40 * 8 / (end - start) for start, end in spans]
        if min(rates) > 2 * INTER:
            return
    pytest.fail(f"{rates} Mbit/s without a limit")
