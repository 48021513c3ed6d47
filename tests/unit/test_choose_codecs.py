"""The compression "auto": a codec only where it is predicted to save time."""

from __future__ import annotations

import pytest

from planmoe_ds.choose_codecs import CodecCost, choose_codecs
from planmoe_ds.topology import Topology
from tests.unit.test_choose import LAYER, costs_of

TWO_BY_EIGHT = Topology.from_labels(rank // 8 for rank in range(16))
FAST = CodecCost("hadamard_int8", 0.25, 1e-12)
SLOW = CodecCost("hadamard_int8", 0.25, 1e-8)


@pytest.mark.parametrize("comm", ["direct", "pipe", "dedup", "hierarchical"])
@pytest.mark.parametrize(
    ("intra", "inter", "codec", "chosen"),
    [
        (100e9, 1e9, FAST, ("hadamard_int8", "none")),  # the network is what takes the time
        (1e9, 1000e9, FAST, ("none", "hadamard_int8")),
        (1e9, 0.9e9, FAST, ("hadamard_int8", "hadamard_int8")),  # one alone would leave the other as the slowest
        (100e9, 100e9, SLOW, ("none", "none")),  # the codec is slower than the links
    ],
    ids=["slow network", "slow node", "both slow", "slow codec"],
)
def test_where_it_pays(comm: str, intra: float, inter: float, codec: CodecCost, chosen: tuple[str, str]) -> None:
    choice = choose_codecs(costs_of(TWO_BY_EIGHT, intra, inter), TWO_BY_EIGHT, LAYER, comm, codec)
    if comm == "hierarchical" and chosen.count("none") == 1:  # its legs take turns: every byte saved counts
        assert choice.compression.inter != "none" or choice.compression.intra != "none"
    elif comm in ("direct", "pipe"):
        assert (choice.compression.inter, choice.compression.intra) == chosen
    assert ("no codec" in choice.reason) == (choice.compression.names() == ["none"])
    assert "ms" in choice.reason


def test_one_node() -> None:
    node = Topology.from_labels([0] * 4)
    slow = choose_codecs(costs_of(node, 1e8, 0), node, LAYER, "direct", FAST).compression
    assert (slow.inter, slow.intra) == ("none", "hadamard_int8")
    assert choose_codecs(costs_of(node, 1e12, 0), node, LAYER, "direct", SLOW).compression.names() == ["none"]


def test_the_preferred_codec_unless_another_is_faster() -> None:
    costs = costs_of(TWO_BY_EIGHT, 100e9, 1e9)
    small = CodecCost("int8", 0.25, 1e-12)
    alike = choose_codecs(costs, TWO_BY_EIGHT, LAYER, "direct", FAST, small).compression
    assert alike.inter == "hadamard_int8"
    filled_up = CodecCost("hadamard_int8", 0.69, 1e-12)  # rows much shorter than its blocks
    choice = choose_codecs(costs, TWO_BY_EIGHT, LAYER, "direct", filled_up, small)
    assert (choice.compression.inter, choice.compression.intra) == ("int8", "none")
    assert "int8 between nodes" in choice.reason
