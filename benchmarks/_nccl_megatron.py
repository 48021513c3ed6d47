"""A GPT whose every other block has experts, trained with megatron.core on GPUs; for benchmarks/train_nccl.py."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._stock import without_megatron_all_to_all

VOCABULARY = 256


class MegatronTraining:
    """bf16 with fp32 master weights and Megatron's distributed optimizer; collective."""

    without_all_to_all = staticmethod(without_megatron_all_to_all)

    def __init__(self, arguments: argparse.Namespace, section: Any, device: torch.device) -> None:
        prepare_megatron()
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from planmoe_ds.integrations.megatron import activate

        config = make_config(arguments)
        with device:
            model = make_model(config, arguments.sequence_length)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=False
        )
        self.model: Any = DistributedDataParallel(config, settings, Float16Module(config, model.to(device)))
        self.session = activate(self.model, section) if section is not None else None
        options = OptimizerConfig(
            optimizer="adam", lr=1e-4, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])

    def step(self, tokens: torch.Tensor) -> None:
        """Forward, backward, the gradients' reduction and the optimizer, on tokens [B, T + 1]."""
        from megatron.core.distributed import finalize_model_grads

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
        losses = self.model(inputs, positions, None, labels=labels)
        losses.float().mean().backward()
        finalize_model_grads([self.model])
        self.optimizer.step()


def prepare_megatron() -> None:
    """Groups with all ranks expert-parallel, and what Megatron misses where Transformer Engine is not installed."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_without_engine import do_without_transformer_engine

    do_without_transformer_engine()
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
