"""Two MoE layers of each framework, planmoe on or off, with handles for what the faults change in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

HIDDEN, EXPERTS, TOP_K = 16, 8, 2
FAVOURITE = 5  # the expert that every token prefers once `favour` was called


@dataclass
class Layers:
    """Functions from [8, 4, H] to the same, each with its module."""

    functions: list[Callable[[torch.Tensor], torch.Tensor]]
    modules: list[nn.Module]
    experts: Callable[[nn.Module], Any]  # this rank's of a module
    router_weight: Callable[[nn.Module], torch.Tensor]  # [experts, H]
    double_capacity: Callable[[], None]

    def each_expert(self, index: int, action: Callable[[], None]) -> None:
        """Call `action` when an expert of a layer runs here."""
        for expert in self.experts(self.modules[index]):
            expert.register_forward_pre_hook(lambda *_: action())

    def favour(self) -> None:
        """Send every token of positive entries to expert FAVOURITE first."""
        for module in self.modules:
            with torch.no_grad():
                self.router_weight(module).zero_()[FAVOURITE] = 1.0


def deepspeed_layers(planmoe: Mapping[str, Any] | None, hidden: int, top_k: int, capacity: bool) -> Layers:
    """DeepSpeed's MoE; `capacity` changes nothing, it always has one."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    del capacity
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    modules = nn.ModuleList(
        MoE(hidden, nn.Linear(hidden, hidden), num_experts=EXPERTS, ep_size=dist.get_world_size(), k=top_k)
        for _ in range(2)
    )
    for module in modules:
        module.set_deepspeed_parallelism()
    if planmoe is not None:
        import planmoe_ds

        planmoe_ds.activate(modules, dict(planmoe))

    def double_capacity() -> None:
        for module in modules:
            module.deepspeed_moe.gate.capacity_factor *= 2

    return Layers(
        functions=[lambda rows, module=module: module(rows)[0] for module in modules],  # type: ignore[misc]
        modules=list(modules),
        experts=lambda module: module.deepspeed_moe.experts.deepspeed_experts,
        router_weight=lambda module: module.deepspeed_moe.gate.wg.weight,
        double_capacity=double_capacity,
    )


def megatron_layers(
    planmoe: Mapping[str, Any] | None, hidden: int, top_k: int, capacity: bool, ep_size: int | None = None
) -> Layers:
    """megatron.core's MoELayer of SequentialMLP, dropless unless `capacity` (drop and pad); ep_size: all ranks."""
    from tests.megatron.cases import PAD, Case
    from tests.megatron.training import make_chunks, make_config, start

    config = {
        "hidden_size": hidden,
        "moe_router_topk": top_k,
        "moe_router_load_balancing_type": "none",
        **(PAD if capacity else {}),
    }
    case = Case("faults", expert=ep_size or dist.get_world_size(), config=config)
    start(case)
    model = make_chunks(case, make_config(case))[0]
    if planmoe is not None:
        from planmoe_ds.integrations.megatron import activate

        activate(model, dict(planmoe))
    modules = [layer.mlp for layer in model.module.decoder.layers]
    for parameter in modules[1].experts.parameters():  # which were the first layer's
        parameter.data *= 2

    def double_capacity() -> None:
        for module in modules:
            factor = 2 * module.config.moe_expert_capacity_factor
            config = dataclasses.replace(module.config, moe_expert_capacity_factor=factor)
            module.token_dispatcher.config = module.router.config = config
            module.token_dispatcher.moe_expert_capacity_factor = factor

    return Layers(
        functions=[lambda rows, module=module: module(rows)[0] for module in modules],  # type: ignore[misc]
        modules=modules,
        experts=lambda module: module.experts.local_experts,
        router_weight=lambda module: module.router.weight,
        double_capacity=double_capacity,
    )


FRAMEWORKS = {"DeepSpeed": deepspeed_layers, "Megatron": megatron_layers}
