"""The compression "auto": a codec only where it is predicted to save time."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import planmoe_ds.choose_codecs as choose_codecs_module
from planmoe_ds.choose_codecs import (
    CodecChoice,
    CodecCost,
    choose_codecs,
    measure_codec,
    resolve_compression,
    with_agreements,
)
from planmoe_ds.config import parse_config
from planmoe_ds.topology import Topology
from tests.harness.ranks import RankPool
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


def test_what_a_codec_takes_whatever_the_size_counts() -> None:
    costs = costs_of(TWO_BY_EIGHT, 100e9, 1e9)
    quick = CodecCost("lossless", 0.78, 1e-12)
    assert choose_codecs(costs, TWO_BY_EIGHT, LAYER, "direct", quick).compression.inter == "lossless"
    slow = replace(quick, fixed_seconds=1.0)
    assert choose_codecs(costs, TWO_BY_EIGHT, LAYER, "direct", slow).compression.names() == ["none"]


def resolve(
    monkeypatch: pytest.MonkeyPatch, section: object, dtype: torch.dtype, inter: float, device: str = "cpu"
) -> tuple[list[str], CodecChoice]:
    """Which codecs are measured, and the choice, for two nodes of eight with links of so many bytes per second."""
    measured: list[str] = []

    def measure(name: str, hidden: int, dtype: torch.dtype, device: torch.device, *, counts: bool) -> CodecCost:
        assert counts
        measured.append(f"{name} {dtype}")
        return CodecCost(name, 0.78 if name == "lossless" else 0.5, 1e-12)

    monkeypatch.setattr(choose_codecs_module, "measure_codec", measure)
    group: Any = SimpleNamespace(
        size=16,
        costs=costs_of(TWO_BY_EIGHT, 100e9, inter),
        comm=SimpleNamespace(node_of_rank=TWO_BY_EIGHT.node_of_rank),
        choice=SimpleNamespace(name="direct"),
    )
    rows = (1024, dtype, torch.device(device))
    return measured, resolve_compression(parse_config(section), {"ep": group}, {"ep": LAYER}, rows)["ep"]


@pytest.mark.parametrize("exactness", ["exact", "reordered"])
def test_without_loss_auto_takes_lossless_where_it_pays(monkeypatch: pytest.MonkeyPatch, exactness: str) -> None:
    section = {"compression": "auto", "exactness": exactness}
    measured, choice = resolve(monkeypatch, section, torch.bfloat16, 1e9)
    assert measured == ["lossless torch.bfloat16"]
    assert choice.compression.inter == "lossless"
    assert choice.compression.sums == choice.compression.intra == "none"
    assert "lossless between nodes" in choice.reason
    _, fast = resolve(monkeypatch, section, torch.bfloat16, 100e9, "cuda")
    assert fast.compression.names() == ["none"]
    measured, other = resolve(monkeypatch, section, torch.float32, 1e9)
    assert measured == ["lossless torch.bfloat16"]  # ranks without layers measure it, too
    assert other.compression.names() == ["none"]
    assert "bfloat16 alone" in other.reason


def test_auto_may_lose_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, choice = resolve(monkeypatch, {"compression": "auto"}, torch.bfloat16, 1e9)
    assert measured == ["hadamard_int8 torch.bfloat16", "int8 torch.bfloat16"]
    assert choice.compression.inter == "hadamard_int8"


def test_agreeing_costs_accelerators_more() -> None:
    codec, costs = CodecCost("lossless", 0.78, 0.0), costs_of(TWO_BY_EIGHT, 100e9, 1e9, alpha=1e-4)
    on_cpu, on_gpu = (with_agreements(codec, costs, torch.device(name)).fixed_seconds for name in ("cpu", "cuda"))
    assert 0 < on_cpu < on_gpu < 1e-2


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, False), (torch.float16, True)])
def test_rows_that_lossless_does_not_carry_are_told(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, told: bool
) -> None:
    _, choice = resolve(monkeypatch, {"compression": {"inter": "lossless"}}, dtype, 1e9)
    assert ("other rows travel as they are" in choice.reason) == told


@pytest.mark.parametrize(
    ("compression", "nodes", "used", "told"),
    [
        ({"inter": "lossless", "intra": "int8"}, [0, 0], ["int8", "none"], True),
        ({"inter": "lossless", "sums": "bf16"}, [0, 0], ["none"], True),
        ({"inter": "lossless"}, [0, 1], ["lossless", "none"], False),
        ("int8", [0, 0], ["int8", "none"], False),
    ],
    ids=str,
)
def test_codecs_between_nodes_are_for_groups_that_have_some(
    compression: object, nodes: list[int], used: list[str], told: bool
) -> None:
    group: Any = SimpleNamespace(comm=SimpleNamespace(node_of_rank=nodes))
    config = parse_config({"compression": compression})
    rows = (1024, torch.bfloat16, torch.device("cpu"))
    choice = resolve_compression(config, {"ep": group}, {"ep": LAYER}, rows)["ep"]
    assert choice.compression.names() == used
    assert ("nothing travels between nodes" in choice.reason) is told


def measure_apart() -> float:
    has_layers = dist.get_rank() == 0
    return measure_codec(
        "lossless", 1024 if has_layers else 1, torch.bfloat16, torch.device("cpu"), counts=has_layers
    ).seconds_per_byte


@pytest.mark.distributed
def test_ranks_without_layers_slow_no_codec_down(ranks: RankPool) -> None:
    told = ranks.run(2, measure_apart)
    assert told[0] == told[1]
    assert 0 < told[0] < 1e-8  # with rows of one value it takes twice as long and more
