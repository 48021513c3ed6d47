"""The GPT-MoE example trained with DeepSpeed on GPUs; for benchmarks/train_nccl.py."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._stock import without_all_to_all


class DeepSpeedTraining:
    """bf16, ZeRO 1; collective."""

    without_all_to_all = staticmethod(without_all_to_all)

    def __init__(self, arguments: argparse.Namespace, section: Any, device: torch.device) -> None:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        import planmoe_ds  # noqa: F401  switches the hook on

        deepspeed.init_distributed("nccl")
        model = make_model(arguments, device)
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "parameters"}
        )
        settings = {
            "train_micro_batch_size_per_gpu": arguments.batch_size, "steps_per_print": 10**9,
            "bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}}, "planmoe": section or False,
        }  # fmt: skip
        self.model: Any = deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]
        self.session = self.model.planmoe if section is not None else None

    def step(self, tokens: torch.Tensor) -> None:
        """Forward, backward and the optimizer, on tokens [B, T + 1]."""
        from data import language_loss

        logits, balance_loss = self.model(tokens[:, :-1])
        self.model.backward(language_loss(logits, tokens[:, 1:]) + 0.01 * balance_loss)
        self.model.step()


def make_model(arguments: argparse.Namespace, device: torch.device) -> Any:
    """The example's model of these sizes."""
    from model import GPTMoE, ModelConfig

    torch.manual_seed(1)
    with device:
        return GPTMoE(
            ModelConfig(
                num_layers=arguments.layers, hidden_size=arguments.hidden_size, num_heads=arguments.heads,
                num_experts=arguments.experts, top_k=arguments.top_k, ep_size=dist.get_world_size(),
                sequence_length=arguments.sequence_length,
            )
        )  # fmt: skip
