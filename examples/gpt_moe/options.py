"""The command line of pretrain_deepspeed.py, checked, and the DeepSpeed config that it leads to."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from errors import ExampleError
from model import ModelConfig

DEFAULT_DEEPSPEED_CONFIG = Path(__file__).with_name("ds_config.json")


class RaisingParser(argparse.ArgumentParser):
    """A parser whose errors are exceptions, so that four ranks do not print the usage four times."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed before exiting."""
        raise ExampleError(f"{message}. See {self.prog} --help")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One training run: how long, on what, with which config, and where the results go."""

    steps: int
    batch_size: int
    data: tuple[Path, ...]
    output: Path
    resume: str
    save_every: int
    log_every: int
    evaluation_batches: int
    sample_bytes: int
    planmoe: bool | dict[str, Any]
    model: ModelConfig
    deepspeed_config: dict[str, Any]

    @property
    def batch_shape(self) -> tuple[int, int]:
        """Sequences per rank and micro-batch, and bytes per sequence."""
        return self.batch_size, self.model.sequence_length


def parse_options(arguments: Sequence[str] | None, world_size: int) -> Options:
    """Parse and check the command line for this many ranks; ExampleError names the option and what it may be."""
    parsed = _build_parser().parse_args(arguments)
    for name in ("steps", "batch_size", "sequence_length", "hidden_size", "heads", "layers", "experts", "top_k"):
        if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
            raise ExampleError(f"--{name.replace('_', '-')} is {getattr(parsed, name)}: it must be at least 1")
    model = _model_config(parsed, world_size)
    config = _read_json(parsed.deepspeed_config, "--deepspeed_config")
    planmoe = _planmoe_section(parsed.planmoe, config)
    config["planmoe"] = planmoe
    if parsed.batch_size is not None:
        config["train_micro_batch_size_per_gpu"] = parsed.batch_size
    batch_size = config.setdefault("train_micro_batch_size_per_gpu", 8)
    if not isinstance(batch_size, int):  # "auto" is for Hugging Face's Trainer, which fills it in
        told = f"train_micro_batch_size_per_gpu is {batch_size!r}, expected a number"
        raise ExampleError(f"--deepspeed_config: {told}; --batch-size is one")
    _fit_scheduler(config, parsed.steps)
    return Options(
        steps=parsed.steps,
        batch_size=batch_size,
        data=tuple(parsed.data),
        output=parsed.output,
        resume=parsed.resume,
        save_every=parsed.save_every,
        log_every=parsed.log_every,
        evaluation_batches=parsed.evaluation_batches,
        sample_bytes=parsed.sample_bytes,
        planmoe=planmoe,
        model=model,
        deepspeed_config=config,
    )


def _build_parser() -> argparse.ArgumentParser:
    parser = RaisingParser(
        description="Pretrain a small GPT-MoE on bytes with DeepSpeed and planmoe. The same command run again "
        "continues from the last checkpoint in --output; a finished run is evaluated, or "
        "trained further with a larger --steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=int, default=300, help="training steps in all, those before a resume included")
    run.add_argument("--batch-size", type=int, help="sequences per rank and step (default: the DeepSpeed config's)")
    run.add_argument("--data", type=Path, nargs="+", default=[], help="files (default: Python's standard library)")
    run.add_argument("--output", type=Path, default=Path("output/gpt_moe"), help="folder of checkpoints and report")
    run.add_argument("--resume", choices=("auto", "never"), default="auto", help="never: overwrite what is in --output")
    run.add_argument("--seed", type=int, default=1234, help="of weights and of batches")
    run.add_argument("--save-every", type=int, default=100, help="steps between checkpoints; 0: only at the end")
    run.add_argument("--log-every", type=int, default=20, help="steps between lines where there is no terminal")
    run.add_argument("--evaluation-batches", type=int, default=16, help="validation batches per rank")
    run.add_argument("--sample-bytes", type=int, default=200, help="bytes of text to generate at the end; 0: none")
    model = parser.add_argument_group("model")
    model.add_argument("--sequence-length", type=int, default=96, help="bytes per sequence")
    model.add_argument("--hidden-size", type=int, default=96, help="width of the model")
    model.add_argument("--heads", type=int, default=4, help="attention heads")
    model.add_argument("--layers", type=int, default=4, help="blocks; every second one is a Mixture of Experts")
    model.add_argument("--experts", type=int, default=8, help="experts per Mixture-of-Experts layer, over all ranks")
    model.add_argument("--top-k", type=int, default=2, help="experts per token")
    model.add_argument("--ep-size", type=int, help="ranks that share one layer's experts (default: as many as divide)")
    parallel = parser.add_argument_group("DeepSpeed and planmoe")
    parallel.add_argument("--planmoe", default="on", help="on, off, a JSON object, or a JSON file with such an object")
    parallel.add_argument("--deepspeed_config", type=Path, default=DEFAULT_DEEPSPEED_CONFIG, help="DeepSpeed JSON file")
    parallel.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    parallel.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def _model_config(parsed: argparse.Namespace, world_size: int) -> ModelConfig:
    ep_size = math.gcd(parsed.experts, world_size) if parsed.ep_size is None else parsed.ep_size
    if ep_size < 1 or world_size % ep_size or parsed.experts % ep_size:
        raise ExampleError(
            f"--ep-size is {ep_size}: it must divide the number of ranks ({world_size}) and --experts "
            f"({parsed.experts})"
        )
    if parsed.hidden_size % (2 * parsed.heads):
        raise ExampleError(
            f"--hidden-size is {parsed.hidden_size}: it must be a multiple of twice --heads ({parsed.heads})"
        )
    if parsed.layers < 2:
        raise ExampleError("--layers is 1: a model with a Mixture-of-Experts block needs at least 2")
    if parsed.top_k > parsed.experts:
        raise ExampleError(f"--top-k is {parsed.top_k}: it must be at most --experts ({parsed.experts})")
    return ModelConfig(
        num_layers=parsed.layers,
        hidden_size=parsed.hidden_size,
        num_heads=parsed.heads,
        num_experts=parsed.experts,
        top_k=parsed.top_k,
        ep_size=ep_size,
        sequence_length=parsed.sequence_length,
        seed=parsed.seed,
    )


def _planmoe_section(choice: str, config: dict[str, Any]) -> bool | dict[str, Any]:
    """Return the config's planmoe section: False when off, else what planmoe itself will check."""
    if choice == "off":
        return False
    if choice == "on":
        section = config.get("planmoe", True)
        return section if isinstance(section, bool | dict) else bool(section)
    if not choice.lstrip().startswith("{"):
        return _read_json(Path(choice), "--planmoe (on, off, a JSON object, or a file)")
    try:
        given: dict[str, Any] = json.loads(choice)
    except json.JSONDecodeError as error:
        raise ExampleError(f"--planmoe is not valid JSON: {error}") from error
    return given


def _read_json(path: Path, option: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExampleError(f"{option}: cannot read {str(path)!r}: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ExampleError(f"{option}: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExampleError(f"{option}: {path} must hold a JSON object, not a {type(content).__name__}")
    return content


def _fit_scheduler(config: dict[str, Any], steps: int) -> None:
    """Give a cosine schedule its length, and a short run a warm-up of at most a fifth of it."""
    if config.get("scheduler", {}).get("type") != "WarmupCosineLR":
        return
    parameters = config["scheduler"].setdefault("params", {})
    parameters["total_num_steps"] = steps
    parameters["warmup_num_steps"] = min(parameters.get("warmup_num_steps", steps), max(2, steps // 5))
