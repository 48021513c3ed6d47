"""Trains a small GPT-MoE with megatron.core and compares two trainings; imported by rank processes only."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron import on_cpu  # noqa: F401  before megatron
from tests.megatron.cases import Case

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig

from planmoe_ds.errors import PlanMoEError  # noqa: F401  for tests
from planmoe_ds.integrations.megatron import activate
from tests.engine.support import drop_groups, rank_device
from tests.megatron.drops import record_drops, replay_drops

VOCABULARY, LENGTH, SEQUENCES, EXPERTS = 64, 12, 2, 8
DEVICE = rank_device()

Values = dict[str, torch.Tensor]


def forget_layers() -> None:
    """Megatron's log of losses by layer has the number of layers of an earlier training."""
    try:
        from megatron.core.transformer.moe.moe_logging import set_moe_metrics_tracker  # 0.18 and later
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        get_moe_layer_wise_logging_tracker().clear()
    else:
        set_moe_metrics_tracker(None)


def start(case: Case) -> None:
    """Make Megatron's groups; those of an earlier training go, since each holds threads."""
    parallel_state.destroy_model_parallel()
    drop_groups()
    forget_layers()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # and this that training's shape
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        virtual_pipeline_model_parallel_size=case.virtual,
        expert_model_parallel_size=case.expert,
        expert_tensor_parallel_size=case.expert_tensor,
    )


def make_config(case: Case, **extra: Any) -> TransformerConfig:
    """The case's config: two layers of 8 experts, top-2, unless it says otherwise."""
    settings = {
        "num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32,
        "num_moe_experts": EXPERTS, "moe_ffn_hidden_size": 32, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01,
        "moe_router_load_balancing_type": "aux_loss", "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True,
        "bias_activation_fusion": False, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False, "apply_rope_fusion": False, "persist_layer_norm": False,
        "tensor_model_parallel_size": case.tensor, "sequence_parallel": case.tensor > 1,
        "pipeline_model_parallel_size": case.pipeline, "pipeline_dtype": torch.float32,
        "virtual_pipeline_model_parallel_size": case.virtual, "expert_model_parallel_size": case.expert,
        "expert_tensor_parallel_size": case.expert_tensor,
        **case.config, **extra,
    }  # fmt: skip
    return TransformerConfig(**settings)


def make_chunks(case: Case, config: TransformerConfig) -> list[Any]:
    """This stage's chunks, wrapped for data parallelism; experts start apart, whoever holds them."""
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    chunks = []
    for place in range(case.virtual or 1):
        stage = place if case.virtual else None
        ends = {"ignore_virtual": False, "vp_stage": stage}
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        _tell_experts_apart(model)
        model.to(DEVICE)
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=case.distributed_optimizer, overlap_grad_reduce=False, bucket_size=None
        )
        chunks.append(DistributedDataParallel(config, settings, model))
    return chunks


def _tell_experts_apart(model: torch.nn.Module) -> None:
    shift = parallel_state.get_expert_model_parallel_rank()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            generator = torch.Generator().manual_seed(len(name) + 1000 * shift + parameter.shape[0])
            parameter.data.normal_(std=0.1, generator=generator)


def train(case: Case, section: Mapping[str, Any] | None) -> Values:
    """Losses of every step and parameters at the end, by name; section None: Megatron's own all-to-all."""
    start(case)
    config = make_config(case)
    chunks = make_chunks(case, config)
    if section is not None:
        activate(chunks, section)
    return run_steps(case, config, chunks)


def run_steps(case: Case, config: TransformerConfig, chunks: list[Any]) -> Values:
    """Train built chunks."""
    options = OptimizerConfig(
        optimizer="adam", lr=3e-3, use_distributed_optimizer=case.distributed_optimizer, clip_grad=1.0
    )
    optimizer = get_megatron_optimizer(options, chunks)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    values: Values = {}
    for step in range(case.steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batches = [[_batch(step, number) for number in range(case.micro_batches)] for _ in chunks]
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=[iter(part) for part in batches] if case.virtual else iter(batches[0]),
            model=chunks if case.virtual else chunks[0],
            num_microbatches=case.micro_batches,
            seq_length=LENGTH,
            micro_batch_size=SEQUENCES,
            forward_only=False,
        )
        optimizer.step()
        for number, loss in enumerate(losses):
            values[f"step {step}, micro-batch {number}: loss"] = loss["loss"]
    for place, chunk in enumerate(chunks):
        values |= {f"chunk {place}: {name}": parameter.detach().clone() for name, parameter in chunk.named_parameters()}
    return values


def _batch(step: int, number: int) -> torch.Tensor:
    seed = 1000 * step + 10 * number + parallel_state.get_data_parallel_rank() * 77_777
    return torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _forward_step(batches: Any, model: Any) -> Any:
    tokens = next(batches)
    positions = torch.arange(LENGTH, device=DEVICE).expand(SEQUENCES, -1)
    output = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return output, partial(_mean_loss)


def _mean_loss(losses: torch.Tensor) -> Any:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def difference(expected: Values, found: Values, tolerance: float) -> str:
    """What differs by more than `tolerance` times the largest value; an empty string when nothing does."""
    if expected.keys() != found.keys():
        return f"names differ: {sorted(expected.keys() ^ found.keys())[:5]}"
    for name, value in expected.items():
        bound = tolerance * value.abs().max().clamp(min=1e-3)
        error = (value - found[name]).abs().max()
        if not error <= bound:
            return f"{name}: differs by {error:.3g}, allowed {bound:.3g}"
    return ""


def compare(case: Case, sections: Mapping[str, tuple[Mapping[str, Any], float]]) -> dict[str, str]:
    """Per named section: what differs from Megatron's own all-to-all; with a tolerance, ties are dropped alike."""
    kept: list[torch.Tensor] = []
    with record_drops(kept):
        stock = train(case, None)
    results = {}
    for name, (section, tolerance) in sections.items():
        with replay_drops(kept) if tolerance else nullcontext():
            results[name] = difference(stock, train(case, section), tolerance)
    dist.barrier()
    return results
