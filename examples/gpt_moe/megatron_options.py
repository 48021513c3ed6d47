"""The command line of pretrain_megatron.py: Megatron's own names where Megatron has one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from errors import ExampleError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model, and how its ranks share it."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_experts: int
    top_k: int
    ep_size: int
    tp_size: int
    sequence_length: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run: how long, on what, with which settings, and where the results go."""

    steps: int
    batch_size: int
    num_micro_batches: int
    learning_rate: float
    bf16: bool
    data: tuple[Path, ...]
    output: Path
    resume: str
    save_every: int
    log_every: int
    evaluation_batches: int
    sample_bytes: int
    planmoe: bool | dict[str, Any]
    model: ModelConfig

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Sequences per micro-batch, and bytes per sequence."""
        return self.batch_size, self.model.sequence_length


class RaisingParser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that four ranks do not print the usage four times."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed before exiting."""
        raise ExampleError(f"{message}. See {self.prog} --help")


def parse_options(arguments: Sequence[str] | None, world_size: int) -> Options:
    """Parse and check the command line for this many ranks; ExampleError names the option and what it may be."""
    parsed = _build_parser().parse_args(arguments)
    model = _model_config(parsed, world_size)
    data_ranks = world_size // model.tp_size
    global_batch = parsed.global_batch_size or parsed.micro_batch_size * data_ranks
    if global_batch % (parsed.micro_batch_size * data_ranks):
        raise ExampleError(
            f"--global-batch-size is {global_batch}: it must be a multiple of --micro-batch-size times the number of "
            f"data-parallel ranks, {parsed.micro_batch_size * data_ranks}"
        )
    return Options(
        steps=parsed.train_iters,
        batch_size=parsed.micro_batch_size,
        num_micro_batches=global_batch // (parsed.micro_batch_size * data_ranks),
        learning_rate=parsed.lr,
        bf16=parsed.bf16,
        data=tuple(parsed.data_path),
        output=parsed.save,
        resume=parsed.resume,
        save_every=parsed.save_interval,
        log_every=parsed.log_interval,
        evaluation_batches=parsed.eval_iters,
        sample_bytes=parsed.sample_bytes,
        planmoe=_planmoe_section(parsed),
        model=model,
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = RaisingParser(
        description="Pretrain a small GPT-MoE on bytes with megatron.core and planmoe. The same command run again "
        "continues from the last checkpoint in --save; a finished run is evaluated, or trained further with larger "
        "--train-iters.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--train-iters", type=int, default=300, help="training steps, those before a resume included")
    run.add_argument("--micro-batch-size", type=int, default=8, help="sequences per rank and micro-batch")
    run.add_argument("--global-batch-size", type=int, help="sequences per step (default: one micro-batch per rank)")
    run.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    run.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    run.add_argument("--data-path", type=Path, nargs="+", default=[], help="files (default: the standard library)")
    run.add_argument("--save", type=Path, default=Path("output/gpt_moe_megatron"), help="checkpoints and report")
    run.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: overwrite what is in --save")
    run.add_argument("--seed", type=int, default=1234, help="of weights and of batches")
    run.add_argument("--save-interval", type=int, default=100, help="steps between checkpoints; 0: only at the end")
    run.add_argument("--log-interval", type=int, default=20, help="steps between lines where there is no terminal")
    run.add_argument("--eval-iters", type=int, default=16, help="validation batches per rank")
    run.add_argument("--sample-bytes", type=int, default=200, help="bytes of text to generate at the end; 0: none")
    model = parser.add_argument_group("model")
    model.add_argument("--seq-length", type=int, default=96, help="bytes per sequence")
    model.add_argument("--hidden-size", type=int, default=96, help="width of the model")
    model.add_argument("--num-attention-heads", type=int, default=4, help="attention heads")
    model.add_argument("--num-layers", type=int, default=4, help="blocks; every second one is a Mixture of Experts")
    model.add_argument("--num-experts", type=int, default=8, help="experts per Mixture-of-Experts layer")
    model.add_argument("--moe-router-topk", type=int, default=2, help="experts per token")
    parallel = parser.add_argument_group("parallelism and planmoe")
    parallel.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share dense layers")
    parallel.add_argument("--expert-model-parallel-size", type=int, help="ranks that share experts (default: most)")
    parallel.add_argument(
        "--moe-token-dispatcher", choices=("planmoe", "alltoall"), default="planmoe", help="what moves the tokens"
    )
    parallel.add_argument("--planmoe-config", type=Path, help="JSON file of planmoe's settings")
    parallel.add_argument("--planmoe-chunks", type=int, help="planmoe's chunks")
    parallel.add_argument("--planmoe-scheduler", help="planmoe's scheduler")
    parallel.add_argument("--planmoe-comm", help="planmoe's all-to-all")
    parallel.add_argument("--planmoe-compression", help="planmoe's codec")
    return parser


def _model_config(parsed: argparse.Namespace, world_size: int) -> ModelConfig:
    for name, value in vars(parsed).items():
        if isinstance(value, int) and value < 1 and name not in ("save_interval", "sample_bytes", "bf16", "seed"):
            raise ExampleError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    tp_size = parsed.tensor_model_parallel_size
    ep_size = parsed.expert_model_parallel_size or math.gcd(parsed.num_experts, world_size)
    if world_size % tp_size or parsed.num_attention_heads % tp_size or parsed.seq_length % tp_size:
        raise ExampleError(
            f"--tensor-model-parallel-size is {tp_size}: it must divide the number of ranks ({world_size}), "
            f"--num-attention-heads ({parsed.num_attention_heads}) and --seq-length ({parsed.seq_length})"
        )
    if world_size % ep_size or parsed.num_experts % ep_size:
        raise ExampleError(
            f"--expert-model-parallel-size is {ep_size}: it must divide the number of ranks ({world_size}) and "
            f"--num-experts ({parsed.num_experts})"
        )
    if parsed.hidden_size % (2 * parsed.num_attention_heads):
        raise ExampleError(
            f"--hidden-size is {parsed.hidden_size}: it must be a multiple of twice --num-attention-heads "
            f"({parsed.num_attention_heads})"
        )
    if parsed.moe_router_topk > parsed.num_experts or parsed.num_layers < 2:
        raise ExampleError("--moe-router-topk must be at most --num-experts, and --num-layers at least 2")
    return ModelConfig(
        num_layers=parsed.num_layers,
        hidden_size=parsed.hidden_size,
        num_heads=parsed.num_attention_heads,
        num_experts=parsed.num_experts,
        top_k=parsed.moe_router_topk,
        ep_size=ep_size,
        tp_size=tp_size,
        sequence_length=parsed.seq_length,
        seed=parsed.seed,
    )


def _planmoe_section(parsed: argparse.Namespace) -> bool | dict[str, Any]:
    """False with Megatron's own dispatcher, else what planmoe itself will check."""
    flags = {name: getattr(parsed, f"planmoe_{name}") for name in ("chunks", "scheduler", "comm", "compression")}
    given = {key: value for key, value in flags.items() if value is not None}
    if parsed.moe_token_dispatcher != "planmoe":
        if given or parsed.planmoe_config:
            raise ExampleError("--planmoe-… settings need --moe-token-dispatcher planmoe")
        return False
    if parsed.planmoe_config is None:
        return given or True
    try:
        settings = json.loads(parsed.planmoe_config.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ExampleError(f"--planmoe-config {parsed.planmoe_config}: {error}") from error
    if not isinstance(settings, dict):
        raise ExampleError(f"--planmoe-config {parsed.planmoe_config} holds {settings!r}: settings by name are wanted")
    return {**settings, **given}
