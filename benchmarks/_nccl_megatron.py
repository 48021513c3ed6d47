"""A GPT whose every other block has experts, trained with megatron.core on GPUs; for benchmarks/train_nccl.py."""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._stock import without_megatron_all_to_all

VOCABULARY = 256


class MegatronTraining:
    """bf16 with fp32 master weights and Megatron's distributed optimizer; collective."""

    def __init__(self, arguments: argparse.Namespace, section: Any, device: torch.device) -> None:
        prepare_megatron()
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        config = make_config(arguments)
        with device:
            model = make_model(config, arguments.sequence_length)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=False
        )
        self.model: Any = DistributedDataParallel(config, settings, Float16Module(config, model.to(device)))
        self.session = self._activate(section, arguments) if section is not None else None
        options = OptimizerConfig(
            optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])
        torch.manual_seed(1 + dist.get_rank())
        shape = arguments.batch_size, arguments.sequence_length + 1
        self.tokens = torch.randint(0, VOCABULARY, shape, device=device)
        self.positions = torch.arange(arguments.sequence_length, device=device).expand(arguments.batch_size, -1)
        self.num_parameters = self._count_parameters()

    def _activate(self, section: Any, arguments: argparse.Namespace) -> Any:
        from planmoe_ds.integrations.megatron import activate

        return activate(self.model, {**section, "ranks_per_node": dist.get_world_size() // arguments.hosts})

    def _count_parameters(self) -> int:
        """Of the whole model: each rank holds other experts."""
        size = dist.get_world_size()
        return sum(
            values.numel() * (1 if getattr(values, "allreduce", True) else size) for values in self.model.parameters()
        )

    def step(self) -> None:
        """Forward, backward, the gradients' reduction and the optimizer."""
        from megatron.core.distributed import finalize_model_grads

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.model(
            self.tokens[:, :-1].contiguous(), self.positions, None, labels=self.tokens[:, 1:].contiguous()
        )
        losses.float().mean().backward()
        finalize_model_grads([self.model])
        self.optimizer.step()

    @staticmethod
    def without_all_to_all(*, active: bool) -> AbstractContextManager[None]:
        """Stock with its all-to-alls left out."""
        return without_megatron_all_to_all(active=active)


def prepare_megatron() -> None:
    """Groups with all ranks expert-parallel, and what Megatron misses where Transformer Engine is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        from megatron_without_engine import do_without_transformer_engine

        do_without_transformer_engine()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)


def make_config(arguments: argparse.Namespace) -> Any:
    """Every other layer with experts of four times the hidden size, as in the DeepSpeed example."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=arguments.layers, hidden_size=arguments.hidden_size, num_attention_heads=arguments.heads,
        ffn_hidden_size=4 * arguments.hidden_size, moe_ffn_hidden_size=4 * arguments.hidden_size,
        num_moe_experts=arguments.experts, moe_router_topk=arguments.top_k, moe_layer_freq=2,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.01, moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=dist.get_world_size(), add_bias_linear=False, bf16=True,
        params_dtype=torch.bfloat16, pipeline_dtype=torch.bfloat16, attention_dropout=0.0, hidden_dropout=0.0,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
    )  # fmt: skip


def make_model(config: Any, sequence_length: int) -> Any:
    """megatron.core's GPT of plain torch modules."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCABULARY,
        max_sequence_length=sequence_length,
        position_embedding_type="rope",
    )
