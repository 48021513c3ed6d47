"""Small engine layers without a framework, for tests."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.codecs import make_codecs
from planmoe_ds.compression import CompressionConfig
from planmoe_ds.config import parse_config
from planmoe_ds.connect import connect, connect_hosts
from planmoe_ds.experts import LocalExperts
from planmoe_ds.guard import QualityGuard
from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.plan import Routes
from planmoe_ds.recorder import Recorder


def make_layer(settings: dict[str, object], index: int = 0) -> ExpertParallelLayer:
    """A layer over all ranks of the world; collective."""
    config = parse_config(settings)
    device = rank_device()
    group = connect({"experts": list(range(dist.get_world_size()))}, config, device)["experts"]
    assert isinstance(config.compression, CompressionConfig)
    connect_hosts([group] if config.compression.may_refuse() else [], config)
    codecs, recorder = make_codecs(config.compression), Recorder(device)
    guard = None if config.guard is None else QualityGuard(config.guard, config.compression, index, recorder)
    return ExpertParallelLayer(index=index, config=config, group=group, codecs=codecs, recorder=recorder, guard=guard)


def rank_device() -> torch.device:
    """This rank's device: the CPU with gloo, a GPU (shared when there are fewer than ranks) with NCCL."""
    if dist.get_backend() != "nccl":
        return torch.device("cpu")
    device = torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def drop_groups() -> None:
    """Destroy every process group but the world's: each holds threads, and memory of the GPU; collective."""
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def slots_of(expert_KT: torch.Tensor, num_experts: int) -> torch.Tensor:
    """First come, first served places in every expert's capacity; zero for dropped routes."""
    used = [0] * num_experts
    slots = torch.zeros_like(expert_KT)
    for place, expert in enumerate(expert_KT.flatten().tolist()):
        if expert >= 0:
            slots.view(-1)[place] = used[expert]
            used[expert] += 1
    return slots


def routes_of(expert_KT: torch.Tensor, num_experts: int, weight_KT: torch.Tensor | None = None) -> Routes:
    """Routes with weights 1 unless given and the smallest capacity that fits."""
    slots = slots_of(expert_KT, num_experts)
    capacity = int(slots.max()) + 1 if slots.numel() else 1
    weights = torch.ones(expert_KT.shape, device=expert_KT.device) if weight_KT is None else weight_KT
    return Routes(expert_KT, slots, weights, num_experts, capacity)


def padded_runner(modules: Sequence[nn.Module]):  # type: ignore[no-untyped-def]
    """The framework's runner: [P, L, C, H] cut along L."""

    def run(inputs: torch.Tensor) -> torch.Tensor:
        pieces = inputs.chunk(len(modules), dim=1)
        return torch.cat([module(piece) for module, piece in zip(modules, pieces, strict=True)], dim=1)

    return run


def run_layer(
    layer: ExpertParallelLayer, tokens: torch.Tensor, routes: Routes, experts: Sequence[nn.Module]
) -> torch.Tensor:
    """One forward of the layer with these local experts, on its device; the output comes back to the tokens'."""
    device = layer.group.comm.device
    for expert in experts:
        expert.to(device)
    moved = {name: value.to(device) for name, value in vars(routes).items() if isinstance(value, torch.Tensor)}
    local = LocalExperts(experts, padded_runner(experts))
    return layer.forward(tokens.to(device), replace(routes, **moved), local).to(tokens.device)
