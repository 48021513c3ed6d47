"""The GPT-MoE example as benchmarks train it: engines, steps, and the tensors its MoE layers encode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_as_ranks(num_ranks: int) -> None:
    """In the first process: run this command on that many ranks of this machine and exit."""
    if "RANK" in os.environ:
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    sys.exit(subprocess.run([*launcher, *sys.argv], env=environment, check=False).returncode)


def join_ranks() -> None:
    """Be one rank, over gloo, with the example importable."""
    sys.path[:0] = [str(ROOT), str(ROOT / "examples/gpt_moe")]
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import torch

    import planmoe_ds  # noqa: F401  switches the hook on

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for long, and training never calls it
    deepspeed.init_distributed("gloo")


def make_engine(arguments: Namespace, seed: int, section: Any) -> Any:
    """The example's model for this seed with a planmoe section; `arguments` has the sizes of its layers."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from model import ModelConfig, build_model

    model = build_model(
        ModelConfig(
            num_layers=arguments.layers,
            hidden_size=arguments.hidden_size,
            num_experts=arguments.experts,
            top_k=arguments.top_k,
            ep_size=dist.get_world_size(),
            sequence_length=arguments.sequence_length,
            seed=seed,
        ),
        dist.get_rank(),
    )
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    settings = json.loads((ROOT / "examples/gpt_moe/ds_config.json").read_text())
    settings |= {"train_micro_batch_size_per_gpu": arguments.batch_size, "planmoe": section, "steps_per_print": 10**9}
    settings["scheduler"]["params"] |= {"total_num_steps": arguments.steps, "warmup_num_steps": arguments.steps // 5}
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


def take_step(engine: Any, inputs: Any, targets: Any) -> float:
    """One training step; the loss of this rank's batch."""
    from data import language_loss

    logits, balance_loss = engine(inputs)
    loss = language_loss(logits, targets)
    engine.backward(loss + 0.01 * balance_loss)
    engine.step()
    return float(loss.detach())
