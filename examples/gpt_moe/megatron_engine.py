"""The megatron.core side of the example: model, optimizer and one training step; megatron.training is not needed.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data import VOCABULARY_SIZE, language_loss
from errors import ExampleError
from launch_env import ProcessPlace, meet_ranks
from megatron_options import Options

BALANCE_LOSS_WEIGHT = 0.01
WARMUP_SHARE = 5  # a fifth of the steps, at most 50
MOST_WARMUP_STEPS = 50


class MegatronEngine:
    """A model and its optimizer over all ranks; made by start_engine()."""

    def __init__(self, options: Options, model: Any, device: torch.device) -> None:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        self.options, self.model, self.device = options, model, device
        least = options.learning_rate / 10
        config = OptimizerConfig(
            optimizer="adam", lr=options.learning_rate, min_lr=least, bf16=options.bf16, clip_grad=1.0
        )
        self.optimizer = get_megatron_optimizer(config, [model])
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.schedule = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=options.learning_rate, min_lr=least,
            lr_warmup_steps=min(MOST_WARMUP_STEPS, options.steps // WARMUP_SHARE), lr_decay_steps=options.steps,
            lr_decay_style="cosine", start_wd=0.01, end_wd=0.01, wd_incr_steps=1, wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )  # fmt: skip

    def __call__(self, tokens: Tensor) -> tuple[Tensor, None]:
        """Tokens int64 [B, S] -> logits [B, S, V]."""
        return self.model(tokens, positions_of(tokens), None), None

    def eval(self) -> None:
        """Stop training behaviour."""
        self.model.eval()

    def train(self) -> None:
        """Resume it."""
        self.model.train()

    def step(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step over micro-batches of inputs and targets, int64 [B, S]; returns the mean loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=self.options.model.sequence_length,
            micro_batch_size=self.options.batch_size,
            forward_only=False,
        )
        succeeded, _, _ = self.optimizer.step()
        if succeeded:
            self.schedule.step(1)
        return sum(float(loss["loss"]) for loss in losses) / len(losses)

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def save_checkpoint(self, folder: str, tag: str) -> None:
        """Write this rank's part, and wait for all of them."""
        path = Path(folder) / tag
        path.mkdir(parents=True, exist_ok=True)
        states = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        torch.save(states, path / f"rank{dist.get_rank()}.pt")
        dist.barrier()

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        """Read this rank's part; (None, {}) where it is missing."""
        path = Path(folder) / tag / f"rank{dist.get_rank()}.pt"
        if not path.exists():
            return None, {}
        states = torch.load(path, map_location=self.device, weights_only=True)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        self.schedule.load_state_dict(states["schedule"])
        return str(path), {}


def join_ranks(place: ProcessPlace, options: Options) -> torch.device:
    """Choose this rank's device, meet the other ranks (gloo on CPU, NCCL on GPUs) and make Megatron's groups."""
    if torch.cuda.is_available():
        device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        from megatron_without_engine import do_without_transformer_engine

        do_without_transformer_engine()
    else:
        from megatron_on_cpu import prepare

        device = torch.device("cpu")
        torch.set_num_threads(1)
        prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    meet_ranks("nccl" if device.type == "cuda" else "gloo")
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.model.tp_size,
        expert_model_parallel_size=options.model.ep_size,
        expert_tensor_parallel_size=1,
    )
    torch.manual_seed(options.model.seed)
    model_parallel_cuda_manual_seed(options.model.seed)
    return device


def start_engine(options: Options, device: torch.device) -> MegatronEngine:
    """Build the model, switch planmoe on unless off, then the optimizer; collective over all ranks.

    Raises ExampleError when planmoe refuses a setting.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.module import Float16Module

    config = _transformer_config(options)
    config.finalize_model_grads_func = finalize_model_grads
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_decoder_block_spec(config, use_transformer_engine=False),
        vocab_size=VOCABULARY_SIZE,
        max_sequence_length=options.model.sequence_length,
        parallel_output=False,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    ).to(device)
    _tell_experts_apart(model, options)
    if options.bf16:
        model = Float16Module(config, model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    model = DistributedDataParallel(config, settings, model)
    if options.planmoe is not False:
        from planmoe_ds import PlanMoEError
        from planmoe_ds.integrations.megatron import activate

        try:
            model.planmoe = activate(model, options.planmoe)
        except (PlanMoEError, ValueError) as error:
            raise ExampleError(str(error)) from error
    return MegatronEngine(options, model, device)


def _transformer_config(options: Options) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    model = options.model
    settings = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": [number % 2 for number in range(model.num_layers)],
        "moe_router_topk": model.top_k,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": BALANCE_LOSS_WEIGHT,
        "moe_token_dispatcher_type": "alltoall",  # planmoe takes its place
        "tensor_model_parallel_size": model.tp_size,
        "sequence_parallel": model.tp_size > 1,
        "expert_model_parallel_size": model.ep_size,
        "expert_tensor_parallel_size": 1,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": options.bf16,
        "params_dtype": torch.bfloat16 if options.bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if options.bf16 else torch.float32,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
    }
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return TransformerConfig(**{name: value for name, value in settings.items() if name in known})


def _tell_experts_apart(model: torch.nn.Module, options: Options) -> None:
    """Start every expert from its own place's seed, so that training does not depend on who holds it."""
    from megatron.core import parallel_state

    num_local = options.model.num_experts // options.model.ep_size
    first = parallel_state.get_expert_model_parallel_rank() * num_local
    for name, parameter in model.named_parameters():
        before, found, after = name.partition(".local_experts.")
        if found and parameter.dim() > 1:
            number, rest = after.split(".", 1)
            seed = zlib.crc32(f"{before} {first + int(number)} {rest}".encode())
            generator = torch.Generator().manual_seed(seed + options.model.seed)
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)


def positions_of(tokens: Tensor) -> Tensor:
    """int64 [B, S]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)


def _forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
    inputs, targets = next(batches)
    return model(inputs, positions_of(inputs), None), partial(_loss, targets)


def _loss(targets: Tensor, logits: Tensor) -> Any:
    loss = language_loss(logits, targets)
    return loss, {"loss": loss.detach()}
