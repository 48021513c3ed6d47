"""Runs a script of a Megatron-LM checkout with planmoe's flags on CPU ranks, or on GPUs without Transformer Engine.

    cd Megatron-LM && PYTHONPATH=.:PLANMOE torchrun --nproc_per_node 4 PLANMOE/tests/megatron/run_megatron_lm.py \
        pretrain_gpt.py --transformer-impl local … --moe-token-dispatcher planmoe

On the CPU, megatron.training asks for more of CUDA than megatron.core does. Nothing of the checkout is edited. PLANMOE
is this repository.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "gpt_moe"))

MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "device_memory_used")


def prepare_this_machine() -> None:
    """Fill in what Megatron-LM expects and this machine lacks, before it is imported."""
    if not torch.cuda.is_available():
        replace_cuda()
    else:
        from megatron_without_engine import do_without_transformer_engine

        do_without_transformer_engine()


def replace_cuda() -> None:
    """What megatron.training expects of CUDA."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from megatron_on_cpu import prepare

    prepare()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.set_device = cuda.reset_peak_memory_stats = lambda *_: None
    for name in MEMORY:
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.memory_stats = lambda *_: {}
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: "cpu"
    properties = types.SimpleNamespace(major=9, minor=0, name="cpu", multi_processor_count=1, total_memory=1 << 33)
    cuda.get_device_properties = lambda *_: properties
    tensor: Any = torch.Tensor
    tensor.pin_memory = lambda values, *_: values
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: 0
    dist.init_process_group = _over_gloo(dist.init_process_group, "device_id")
    dist.new_group = _over_gloo(dist.new_group, "pg_options", "device_id")
    plain_barrier = dist.barrier
    dist.barrier = lambda group=None, async_op=False, **_: plain_barrier(group=group, async_op=async_op)
    _skip_fused_kernels()


def _over_gloo(original: Callable[..., Any], *dropped: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in dropped:
            kwargs.pop(name, None)
        return original(*args, **{**kwargs, "backend": "gloo"})

    return call


def _skip_fused_kernels() -> None:
    try:
        from megatron.legacy import fused_kernels
    except ImportError:
        return
    fused_kernels.load = lambda _: None


def share_cards() -> None:
    """LOCAL_RANK, which Megatron takes for the card's number, becomes one that exists: NCCL 2.30 lets ranks share."""
    cards = torch.cuda.device_count()
    if cards > 0:
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % cards)


if __name__ == "__main__":
    share_cards()
    prepare_this_machine()
    from planmoe_ds.megatron import main

    main()
