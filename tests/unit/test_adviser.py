"""The adviser: what it predicts in closed form, what it switches on and off, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from planmoe_ds.adviser import Features, advise, predict_layer
from planmoe_ds.cli import app
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.execution import save_execution
from planmoe_ds.shapes import ClusterShape, ModelShape, load_shape

SLOW = ClusterShape(num_nodes=2, gpus_per_node=8, intra_gigabytes_per_second=25, inter_gigabits_per_second=100)
TOP_8 = ModelShape(tokens_per_rank=4096, hidden_size=2048, inner_size=1408, num_experts=64, top_k=8)


def test_one_gpu_computes_only() -> None:
    cluster = ClusterShape(num_nodes=1, gpus_per_node=1, teraflops=100)
    model = ModelShape(tokens_per_rank=1000, hidden_size=1000, inner_size=1000, num_experts=4, top_k=2)
    found = predict_layer(model, cluster, Features())
    assert found.seconds == pytest.approx(3 * 4 * 2000 * 1e6 / 1e14)
    assert found.expert_seconds == pytest.approx(found.seconds)


def test_exchanges_take_what_the_card_takes() -> None:
    """DESIGN's example: top-8, two nodes of eight GPUs behind one 100 Gb/s card each, 8 copies of every token."""
    cluster = SLOW.model_copy(update={"inter_microseconds": 1e-6, "intra_microseconds": 1e-6})
    found = predict_layer(TOP_8, cluster, Features())
    inter = [
        seconds for task in found.forward.graph.tasks for resource, seconds in task.legs if resource.name == "INTER"
    ]
    crossing = 8 * 4096 * sum_of_chances() * 2048 * 2  # bytes of one node's eight GPUs
    assert max(inter) == pytest.approx(crossing / 12.5e9, rel=1e-6)


def sum_of_chances() -> float:
    """Ranks of the other node that a token goes to: 4 experts of 64 each, 8 picked."""
    none = 1.0
    for pick in range(8):
        none *= (60 - pick) / (64 - pick)
    return 8 * (1 - none)


def test_slow_links_switch_everything_on() -> None:
    advice = advise(TOP_8, SLOW, lossy=True)
    features = advice.chosen.features
    assert features.comm == "dedup"
    assert features.compression == "int8"
    assert features.chunks > 1
    assert advice.chosen.seconds < 0.5 * advice.baseline.seconds
    assert advice.chosen.seconds >= advice.chosen.bound >= 0
    assert len(advice.reasons) == 3
    assert all(": on" in reason for reason in advice.reasons)


def test_fast_links_leave_features_off() -> None:
    fast = ClusterShape(num_nodes=1, gpus_per_node=8, intra_gigabytes_per_second=900, teraflops=1)
    advice = advise(TOP_8, fast, lossy=True)
    assert advice.chosen.features.compression == "none"
    assert advice.chosen.features.comm == "direct"
    assert advice.chosen.seconds <= advice.baseline.seconds
    assert any("off" in reason and ("would lose" in reason or "gains less" in reason) for reason in advice.reasons)


def test_no_lossy_codec_unless_allowed() -> None:
    advice = advise(TOP_8, SLOW)
    assert advice.chosen.features.compression == "none"
    assert any("lossy codecs were not allowed" in reason for reason in advice.reasons)


def test_never_slower_than_nothing() -> None:
    for nodes, gpus in ((1, 8), (2, 4), (4, 8), (64, 8)):
        for rate in (25, 100, 400):
            cluster = ClusterShape(num_nodes=nodes, gpus_per_node=gpus, inter_gigabits_per_second=rate)
            model = ModelShape(num_experts=512, top_k=2, hidden_size=1024, inner_size=4096)
            advice = advise(model, cluster, lossy=True)
            assert advice.chosen.seconds <= advice.baseline.seconds


def test_uneven_load_costs() -> None:
    even = predict_layer(TOP_8, SLOW, Features())
    load = tuple([4.0] * 4 + [1.0] * 60)  # the first rank's experts get four times the others'
    uneven = predict_layer(TOP_8.model_copy(update={"load": load}), SLOW, Features())
    assert uneven.expert_seconds == pytest.approx(even.expert_seconds * 16 / (76 / 16))
    assert uneven.seconds > even.seconds


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_commands(tmp_path: Path) -> None:
    model = write(tmp_path / "model.json", {"num_experts": 64, "top_k": 8, "num_moe_layers": 4})
    cluster = write(tmp_path / "cluster.json", {"num_nodes": 4, "gpus_per_node": 8})
    for command in ("plan", "simulate"):
        found = CliRunner().invoke(app, [command, "--model", model, "--cluster", cluster, "--json"])
        assert found.exit_code == 0, found.output
        answer = json.loads(found.stdout)
        assert answer["planmoe"]["comm"] in ("direct", "pipe", "dedup", "hierarchical")
        assert answer["step_seconds_in_moe_layers"] == pytest.approx(4 * answer["layer_seconds"])
        table = CliRunner().invoke(app, [command, "--model", model, "--cluster", cluster])
        assert '"planmoe": {' in table.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ({"tokens": 3}, "known keys: tokens_per_rank"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9, "num_experts": 8}, "more than the 8 experts"),
        ({"load": [1, 2]}, "load has 2 numbers"),
        ({"num_experts": 2, "load": [-1, 2]}, "none negative"),
    ],
)
def test_bad_models_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    path = Path(write(tmp_path / "model.json", content))
    with pytest.raises(PlanMoEConfigError, match=words):
        load_shape(path, ModelShape)
    with pytest.raises(PlanMoEConfigError, match="cannot be read"):
        load_shape(tmp_path / "missing.json", ModelShape)


@pytest.mark.parametrize("key", ["teraflops", "inter_gigabits_per_second", "num_nodes"])
@pytest.mark.parametrize("value", [0, -1, "NaN"])
def test_bad_clusters_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = Path(write(tmp_path / "cluster.json", {key: value}))
    with pytest.raises(PlanMoEConfigError, match=key):
        load_shape(path, ClusterShape)


def test_links_of_another_cluster_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model.json", {"num_experts": 64})
    cluster = write(tmp_path / "cluster.json", {"num_nodes": 4, "gpus_per_node": 8})
    links = write(tmp_path / "links.json", SLOW.costs().model_dump_json())
    found = CliRunner().invoke(app, ["plan", "--model", model, "--cluster", cluster, "--links", links])
    assert found.exit_code == 2
    assert "measured on 2 nodes with 16 ranks, the cluster has 4 nodes with 32" in found.stderr


def test_experts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model.json", {"num_experts": 10})
    found = CliRunner().invoke(app, ["simulate", "--model", model, "--cluster", write(tmp_path / "c.json", {})])
    assert found.exit_code == 2
    assert "multiple of the 16 ranks" in found.stderr
    model = write(tmp_path / "model.json", {"num_experts": 10, "expert_parallel_size": 5})
    found = CliRunner().invoke(app, ["simulate", "--model", model, "--cluster", write(tmp_path / "c.json", {})])
    assert found.exit_code == 2
    assert "expected a divisor of the 16 ranks" in found.stderr


@pytest.mark.parametrize("num_nodes", [1, 8, 64, 512])
@pytest.mark.parametrize("rate", [25, 400])
@pytest.mark.parametrize("intra", [25, 450], ids=["PCIe", "NVLink"])
def test_clusters_of_up_to_4096_gpus(tmp_path: Path, num_nodes: int, rate: int, intra: int) -> None:
    model = ModelShape(num_experts=64, top_k=8, hidden_size=2048, inner_size=1408, expert_parallel_size=8)
    if num_nodes > 1:
        model = model.model_copy(update={"expert_parallel_size": 64})
    cluster = ClusterShape(num_nodes=num_nodes, inter_gigabits_per_second=rate, intra_gigabytes_per_second=intra)
    advice = advise(model, cluster, lossy=True)
    assert advice.chosen.bound <= advice.chosen.seconds <= advice.baseline.seconds
    whole = advise(model.model_copy(update={"num_experts": cluster.num_gpus, "expert_parallel_size": None}), cluster)
    assert whole.chosen.seconds <= whole.baseline.seconds


def test_a_recorded_trace_says_how_uneven_the_work_is(tmp_path: Path) -> None:
    model = write(tmp_path / "model.json", {"num_experts": 16, "top_k": 2, "num_moe_layers": 1})
    cluster = write(tmp_path / "cluster.json", {"num_nodes": 2, "gpus_per_node": 8})
    even, skewed = tmp_path / "even.json", tmp_path / "skewed.json"
    save_execution(even, [], {}, {0: [5] * 16})
    save_execution(skewed, [], {}, {0: [5] * 16, 1: [35] + [3] * 15})
    seconds = []
    for trace in ([], ["--trace", str(even)], ["--trace", str(skewed)]):
        found = CliRunner().invoke(app, ["simulate", "--model", model, "--cluster", cluster, "--json", *trace])
        assert found.exit_code == 0, found.output
        seconds.append(json.loads(found.stdout)["expert_seconds"])
    assert seconds[1] == pytest.approx(seconds[0])
    assert seconds[2] == pytest.approx(seconds[0] * 35 * 16 / 80)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "was not written by"),
        ({"version": 1}, "was not written by"),
        ({"loads": {"0": ["many"]}}, "was not written by"),
        ({"loads": {}}, "has no routes"),
        ({"loads": {"0": [1, 2]}}, "load has 2 numbers, expected one for each of 64 experts"),
    ],
)
def test_other_traces_are_refused(tmp_path: Path, content: Any, words: str) -> None:
    files = {name: write(tmp_path / f"{name}.json", {}) for name in ("model", "cluster")}
    trace = write(tmp_path / "trace.json", content)
    options = ["--model", files["model"], "--cluster", files["cluster"], "--trace", trace]
    found = CliRunner().invoke(app, ["simulate", *options])
    assert found.exit_code == 2
    assert words in found.stderr
