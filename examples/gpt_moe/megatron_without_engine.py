"""Lets megatron.core 0.15 and 0.16 train without Transformer Engine, which their MoE layers half expect."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch


def do_without_transformer_engine() -> None:
    """Where it is not installed, fill in a name that the router reads, and a norm that takes sequence parallelism."""
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    torch_norm.WrappedTorchNorm.__new__ = _new_norm


def _new_norm(_: type, config: Any, hidden_size: int, eps: float = 1e-5, **__: Any) -> torch.nn.Module:
    """Megatron's plain norm refuses sequence parallelism, which only takes a mark on the parameters."""
    kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
