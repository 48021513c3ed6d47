"""The DeepSpeed engine of the example, and what planmoe adds to it: numbers per step and a timeline."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

from errors import ExampleError
from launch_env import ProcessPlace, meet_ranks
from model import build_model
from options import Options


def join_ranks(place: ProcessPlace) -> None:
    """Choose this rank's device and share of the cores, and meet the other ranks (gloo on CPU, NCCL on GPUs)."""
    # DeepSpeed still calls collectives by names that torch is about to rename: its concern, not the reader's.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
    else:
        accelerator.set_device(place.local_rank % accelerator.device_count())
    meet_ranks(accelerator.communication_backend_name())
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())  # over the same groups


def import_planmoe() -> None:
    """Import planmoe_ds, which is all its hook needs; ExampleError when it is not installed."""
    try:
        importlib.import_module("planmoe_ds")
    except ModuleNotFoundError as error:
        if error.name != "planmoe_ds":
            raise
        raise ExampleError(
            f"planmoe_ds is not installed for {sys.executable}: run `make install` and use .venv/bin/python, or train "
            "on stock DeepSpeed with --planmoe off"
        ) from error


def start_engine(options: Options, place: ProcessPlace) -> DeepSpeedEngine:
    """Build the model and hand it to DeepSpeed, planmoe hooked in unless off; collective over all ranks.

    Raises ExampleError when planmoe is not installed or refuses a setting.
    """
    if options.planmoe is not False:
        import_planmoe()
    model = build_model(options.model, place.rank)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    with planmoes_sentence():
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=options.deepspeed_config)
    return engine


@contextmanager
def planmoes_sentence() -> Iterator[None]:
    """What planmoe refuses inside becomes an ExampleError."""
    try:
        yield
    except ValueError as error:
        if type(error).__module__.startswith("planmoe_ds."):
            raise ExampleError(str(error)) from error
        raise


@contextmanager
def noise_in_file(path: Path) -> Iterator[None]:
    """Send standard output, also that of C++ libraries, to a file: start-up chatter would bury the progress bar."""
    sys.stdout.flush()
    console = os.dup(1)
    with path.open("wb") as log:
        os.dup2(log.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(console, 1)
        os.close(console)


def count_parameters(engine: DeepSpeedEngine, options: Options) -> int:
    """Return the number of parameters of the whole model, the experts of other ranks included."""
    counts = [(param.numel(), is_moe_param(param)) for param in engine.module.parameters()]
    return sum(count * (options.model.ep_size if is_expert else 1) for count, is_expert in counts)


def describe_planmoe(engine: DeepSpeedEngine) -> str:
    """Return one line on what carries the tokens: planmoe with its settings, or stock DeepSpeed."""
    if not hasattr(engine, "planmoe"):
        return "off (stock DeepSpeed)"
    settings = engine.planmoe.config.model_dump_json(exclude_none=True, exclude={"enabled"})
    return f"on, {engine.planmoe.num_layers} layers, {settings}"


def communication_numbers(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Return this rank's bytes and seconds since the last call, by StepRecord's names; empty without planmoe."""
    if not hasattr(engine, "planmoe"):
        return {}
    stats = engine.planmoe.recorder.take()
    names = ("bytes_sent", "stock_bytes", "exposed_seconds", "communication_seconds", "expert_seconds")
    return {name: getattr(stats, name) for name in names}


def start_trace(engine: DeepSpeedEngine) -> None:
    """Let planmoe record spans from here on; nothing without planmoe."""
    if hasattr(engine, "planmoe"):
        engine.planmoe.recorder.start_trace()


def write_timeline(engine: DeepSpeedEngine, folder: Path, title: str) -> None:
    """Stop recording on every rank and, on the first, write timeline.png and timeline.json into the folder."""
    if not hasattr(engine, "planmoe"):
        return
    from planmoe_ds.trace import draw_timeline, write_chrome_trace

    spans = engine.planmoe.recorder.stop_trace()
    if spans and dist.get_rank() == 0:
        draw_timeline(spans, folder / "timeline.png", title)
        write_chrome_trace(spans, folder / "timeline.json")
