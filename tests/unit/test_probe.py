"""The cost model and its fit, the cache, and the probe over real ranks."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from planmoe_ds import probe_command
from planmoe_ds.costs import (
    ClusterCosts,
    LinkCost,
    StaleCacheError,
    cache_path,
    fingerprint,
    fit_link_cost,
    load_costs,
    network_settings,
    save_costs,
)
from planmoe_ds.probe import ProbeReport, run_probe
from planmoe_ds.topology import Topology
from tests.harness.ranks import RankPool

SIZES = [float(4096 * 4**step) for step in range(6)]
COST = LinkCost(alpha_seconds=1e-4, beta_seconds_per_byte=2e-8, worst_error=0.1)
COSTS = ClusterCosts(
    fingerprint="0123456789abcdef", backend="gloo", node_of_rank=[0, 0, 1],
    intra=COST, inter=COST, intra_while_both=COST, inter_while_both=COST, direct_overlap=0.9,
)  # fmt: skip


@given(st.floats(0, 1e-2), st.floats(1e-12, 1e-6))
def test_the_fit_finds_what_made_the_times(alpha: float, beta: float) -> None:
    cost = fit_link_cost(SIZES, [alpha + beta * size for size in SIZES])
    for size in SIZES:
        assert cost.seconds(size) == pytest.approx(alpha + beta * size, rel=1e-4)
    assert cost.worst_error < 1e-4


@given(st.lists(st.floats(0.9, 1.1), min_size=6, max_size=6))
def test_the_fit_bears_noise(noise: list[float]) -> None:
    times = [(1e-4 + 1e-8 * size) * factor for size, factor in zip(SIZES, noise, strict=True)]
    cost = fit_link_cost(SIZES, times)
    assert cost.beta_seconds_per_byte == pytest.approx(1e-8, rel=0.25)
    assert cost.alpha_seconds == pytest.approx(1e-4, rel=0.6)  # 0.54 with the worst of such noise


@given(st.lists(st.floats(1e-6, 10), min_size=6, max_size=6))
def test_any_times_give_usable_costs(times: list[float]) -> None:
    cost = fit_link_cost(SIZES, times)  # LinkCost itself refuses alpha < 0, beta <= 0 and what is not finite
    assert cost.seconds(0) == 0
    assert cost.seconds(1e9) > cost.seconds(1e3) > 0


@pytest.mark.parametrize(
    ("sizes", "times", "words"),
    [
        ([4096.0], [1.0], "two different sizes"),
        ([4096.0, 4096.0], [1.0, 2.0], "two different sizes"),
        ([1.0, 2.0], [1.0], "two different sizes"),
        ([1.0, 2.0], [1.0, 0.0], "must be positive"),
    ],
)
def test_times_that_fit_nothing(sizes: list[float], times: list[float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_link_cost(sizes, times)


def test_the_fingerprint_tells_clusters_apart() -> None:
    marks = {
        fingerprint(["a", "b"], Topology((0, 1)), "gloo", "cpu"),
        fingerprint(["a", "c"], Topology((0, 1)), "gloo", "cpu"),
        fingerprint(["a", "b"], Topology((0, 0)), "gloo", "cpu"),
        fingerprint(["a", "b"], Topology((0, 1)), "nccl", "cpu"),
        fingerprint(["a", "b"], Topology((0, 1)), "gloo", "H200"),
        fingerprint(["a", "b", "b"], Topology((0, 1, 1)), "gloo", "cpu"),
        fingerprint(["a", "b"], Topology((0, 1)), "nccl", "cpu", [{}, {"NCCL_IB_DISABLE": "1"}]),
        fingerprint(["a", "b"], Topology((0, 1)), "nccl", "cpu", [{}, {"NCCL_IB_DISABLE": "0"}]),
    }
    assert len(marks) == 8


def test_settings_that_links_depend_on() -> None:
    settings = {"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    others = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": "log", "NCCL_COMM_ID": "10.0.0.1:4711", "HOME": "/root"}
    assert network_settings({**others, **settings}) == settings


def test_where_the_cache_is(tmp_path: Path) -> None:
    assert cache_path("m", {"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "planmoe" / "links-m.json"
    for environment in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert cache_path("m", environment) == Path.home() / ".cache" / "planmoe" / "links-m.json"


def test_costs_survive_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "new" / "links.json"
    assert load_costs(path, COSTS.fingerprint) is None
    save_costs(COSTS, path)
    assert load_costs(path, COSTS.fingerprint) == COSTS
    assert list(path.parent.iterdir()) == [path]


def spoiled(**changes: object) -> str:
    return json.dumps({**COSTS.model_dump(), **changes})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "file: "),
        (spoiled(version=2), "version: "),
        (spoiled(speed=1), "speed: Extra inputs"),
        (spoiled(node_of_rank=[]), "node_of_rank: "),
        (spoiled(intra=None), "intra must be given for 2 nodes of 2 and 1 ranks"),
        (spoiled(direct_overlap=None), "direct_overlap must be given for 2 nodes"),
        (spoiled(direct_overlap=1.5), "direct_overlap: "),
        (spoiled(node_of_rank=[0, 0]), "inter must be null for 1 node of 2 ranks"),
        (spoiled(inter={**COST.model_dump(), "beta_seconds_per_byte": 0.0}), "inter.beta_seconds_per_byte: "),
        (spoiled(inter={**COST.model_dump(), "alpha_seconds": float("nan")}), "inter.alpha_seconds: "),
        (spoiled(inter={**COST.model_dump(), "alpha_seconds": "fast"}), "inter.alpha_seconds: "),
        (spoiled(fingerprint="ffff"), "fingerprint ffff, this cluster's is 0123456789abcdef"),
    ],
)
def test_a_spoiled_cache_is_refused_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(StaleCacheError, match=r"links\.json.*" + words.replace(".", r"\.")):
        load_costs(path, COSTS.fingerprint)


def probe_here(folder: str, counts: list[int] | None = None, refresh: bool = False) -> ProbeReport:
    topology = None if counts is None else Topology.from_labels(
        node for node, count in enumerate(counts) for _ in range(count)
    )  # fmt: skip
    return run_probe(torch.device("cpu"), topology, refresh=refresh, folder=Path(folder))


@pytest.mark.distributed
def test_measured_once_then_kept(ranks: RankPool, tmp_path: Path) -> None:
    first = ranks.run(3, probe_here, str(tmp_path), [2, 1])
    assert all(report.costs == first[0].costs for report in first)
    assert not first[0].from_cache
    assert first[0].costs.node_of_rank == [0, 0, 1]
    assert None not in (first[0].costs.intra, first[0].costs.inter_while_both)
    second = ranks.run(3, probe_here, str(tmp_path), [2, 1])
    assert [(report.costs, report.from_cache) for report in second] == [(first[0].costs, True)] * 3
    assert not ranks.run(3, probe_here, str(tmp_path), [2, 1], refresh=True)[0].from_cache


@pytest.mark.distributed
@pytest.mark.parametrize(("counts", "present"), [([2], {"intra"}), ([1, 1], {"inter"}), ([1], set())])
def test_links_that_are_not_there(ranks: RankPool, tmp_path: Path, counts: list[int], present: set[str]) -> None:
    costs = ranks.run(sum(counts), probe_here, str(tmp_path), counts)[0].costs
    names = ("intra", "inter", "intra_while_both", "inter_while_both", "direct_overlap")
    assert {name for name in names if getattr(costs, name) is not None} == present


def probe_and_listen(folder: str) -> tuple[ProbeReport, list[str]]:
    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("planmoe_ds.probe").addHandler(listener)
    try:
        return probe_here(folder), messages if dist.get_rank() == 0 else []
    finally:
        logging.getLogger("planmoe_ds.probe").removeHandler(listener)


@pytest.mark.distributed
def test_a_spoiled_cache_is_measured_again(ranks: RankPool, tmp_path: Path) -> None:
    path = ranks.run(2, probe_here, str(tmp_path))[0].path
    path.write_text(path.read_text().replace("alpha", "alfa"))
    report, messages = ranks.run(2, probe_and_listen, str(tmp_path))[0]
    assert not report.from_cache
    assert len(messages) == 1
    assert "measured again" in messages[0]
    assert "alpha_seconds: Field required" in messages[0]
    assert ranks.run(2, probe_here, str(tmp_path))[0].from_cache


@pytest.mark.distributed
def test_a_folder_that_cannot_be_written(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report, messages = ranks.run(2, probe_and_listen, str(tmp_path / "file"))[0]
    assert report.costs.intra is not None
    assert not report.is_kept
    assert "cannot be read" in messages[0]
    assert "cannot be written" in messages[1]
    assert "the next run measures again" in messages[1]


def test_the_table() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    report = ProbeReport(COSTS, Path("/cache/links.json"), from_cache=True)
    probe_command.print_report(report, Topology((0, 0, 1)), console)
    text = console.export_text()
    assert "2 nodes of 2 and 1 ranks, gloo" in text
    assert "inter, both busy" in text
    assert "0.05" in text  # GB/s of 2e-8 s per byte
    assert "kept from an earlier run in /cache/links.json" in text
    assert "hides 90% of the shorter one" in text


def test_the_report_of_costs_that_were_not_kept() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    report = ProbeReport(COSTS, Path("/cache/links.json"), from_cache=False, is_kept=False)
    probe_command.print_report(report, Topology((0, 0, 1)), console)
    assert "measured now, not kept" in console.export_text()


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, {}),
        ({"RANK": "1", "OMPI_COMM_WORLD_RANK": "2"}, {}),
        (
            {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        ),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, {"RANK": "2", "WORLD_SIZE": "4"}),
        (
            {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"},
        ),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, {}),
        (
            {
                "SLURM_PROCID": "9",
                "SLURM_NTASKS": "16",
                "SLURM_LOCALID": "1",
                "SLURM_NTASKS_PER_NODE": "8",
                "SLURM_STEP_ID": "0",
                "PMI_RANK": "9",
                "PMI_SIZE": "16",
            },
            {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"},
        ),
        (
            {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"},
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"},
        ),
    ],
    ids=["none", "torchrun first", "Open MPI", "MPICH", "srun", "batch script", "srun with PMI", "MPICH in a job"],
)
def test_launchers_variables(environment: dict[str, str], found: dict[str, str]) -> None:
    assert probe_command.launcher_variables(environment) == found


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda"),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "cpu"),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}, "cuda"),
        ({"LOCAL_WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}, "cpu"),
    ],
)
def test_ranks_without_a_gpu_each_take_the_cpu(
    environment: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    device = probe_command._device(environment)
    assert device.type == kind
    assert chosen == ([torch.device("cuda", 1)] if kind == "cuda" else [])
    assert ("4 ranks, 2 GPUs here" in capsys.readouterr().err) == (environment.get("LOCAL_RANK") == "0")


def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"RANK": "first", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert probe_command.run() == 2
    assert "planmoe probe: the ranks did not meet: " in capsys.readouterr().err


def test_without_a_launcher_it_says_how(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(probe_command.os, "environ", {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"})
    assert probe_command.run() == 2
    message = capsys.readouterr().err
    assert message.startswith("RANK, MASTER_PORT: not set.")
    assert "torchrun --nproc-per-node 4 --no-python planmoe probe" in message
