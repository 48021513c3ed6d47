"""Whole MoE layers of other systems on one rank, with their routers: what benchmarks/layer.py stands beside."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks._layer_cases import Shape

ROOT = Path(__file__).resolve().parent.parent
CAPACITY_FACTOR = 1.25  # of those that pad
Forward = Callable[[torch.Tensor], torch.Tensor]  # [T, H] -> [T, H]
Maker = Callable[[Shape, torch.device], tuple[nn.Module, Forward]]


def installed_peers() -> list[tuple[str, Maker]]:
    """Name and maker of every system that is installed; bf16, GELU, Tutel's with biases.

    A process group must exist when a maker is called. A module is best dropped before the next one is made.
    """
    return [
        (name, make)
        for package, name, make in (
            ("deepspeed", "DeepSpeed", _make_deepspeed),
            ("deepspeed", "DeepSpeed + planmoe", _make_planmoe),
            ("megatron", "Megatron", _make_megatron),
            ("tutel", "Tutel", _make_tutel),
        )
        if importlib.util.find_spec(package) is not None
    ]


def _make_deepspeed(shape: Shape, device: torch.device) -> tuple[nn.Module, Forward]:
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed(dist.get_backend())
    with device:
        expert = nn.Sequential(
            nn.Linear(shape.hidden, shape.width, bias=False),
            nn.GELU(),
            nn.Linear(shape.width, shape.hidden, bias=False),
        )
        layer = MoE(
            shape.hidden, expert, num_experts=shape.experts, ep_size=1, k=shape.top_k, capacity_factor=CAPACITY_FACTOR,
            use_rts=False, top2_2nd_expert_sampling=False,
        )  # fmt: skip
    layer.set_deepspeed_parallelism()
    layer = layer.to(device, torch.bfloat16)
    return layer, lambda tokens: layer(tokens.unsqueeze(0))[0].squeeze(0)


def _make_planmoe(shape: Shape, device: torch.device) -> tuple[nn.Module, Forward]:
    import planmoe_ds

    layer, forward = _make_deepspeed(shape, device)
    planmoe_ds.activate(nn.ModuleList([layer]), {"exactness": "reordered", "chunks": 1})
    return layer, forward


def _make_megatron(shape: Shape, device: torch.device) -> tuple[nn.Module, Forward]:
    sys.path.append(str(ROOT / "examples/gpt_moe"))
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_without_engine import do_without_transformer_engine

    do_without_transformer_engine()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=shape.hidden, num_attention_heads=16, moe_ffn_hidden_size=shape.width,
        num_moe_experts=shape.experts, moe_router_topk=shape.top_k, moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none", add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=False, bias_activation_fusion=False,
    )  # fmt: skip
    spec: Any = get_moe_module_spec(use_te=False, num_experts=shape.experts, moe_grouped_gemm=False)
    layer = MoELayer(config, spec.submodules).to(device, torch.bfloat16)
    layer.set_layer_number(1)
    return layer, lambda tokens: layer(tokens.unsqueeze(1))[0].squeeze(1)


def _make_tutel(shape: Shape, device: torch.device) -> tuple[nn.Module, Forward]:
    from tutel import moe

    layer: nn.Module = moe.moe_layer(
        gate_type={"type": "top", "k": shape.top_k, "capacity_factor": CAPACITY_FACTOR},
        experts={
            "type": "ffn", "num_experts_per_device": shape.experts, "hidden_size_per_expert": shape.width,
            "activation_fn": functional.gelu,
        },
        model_dim=shape.hidden,
    )  # fmt: skip
    layer = layer.to(device, torch.bfloat16)
    return layer, layer
