"""A checkpoint of two that is not finished: what the frameworks' own saving makes of it, and what they load then."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.faults.stock.layers import EXPERTS, HIDDEN, TOP_K
from tests.faults.stock.steps import ODD, Found, first_line

SMALL_BYTES = 2_000  # less than the weights of one expert
SAVES = ("disk full while saving", "SIGTERM while saving", "loads with another ep_size")


class DeepSpeedRun:
    """An engine, and its own save_checkpoint and load_checkpoint."""

    def __init__(self, ep_size: int) -> None:
        import deepspeed
        from deepspeed.moe.layer import MoE
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

        deepspeed.init_distributed("gloo")
        expert = torch.nn.Linear(HIDDEN, HIDDEN)
        model = torch.nn.ModuleList([MoE(HIDDEN, expert, num_experts=EXPERTS, ep_size=ep_size, k=TOP_K)])
        self.engine: Any = deepspeed.initialize(
            model=model,
            model_parameters=split([{"params": list(model.parameters()), "name": "all"}]),
            config={"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}},
        )[0]

    def save(self, folder: Path, step: int) -> None:
        self.engine.save_checkpoint(str(folder), tag=f"step{step}")

    def load(self, folder: Path) -> str:
        path, _ = self.engine.load_checkpoint(str(folder))
        return f"loads {Path(path).parent.name if path else 'nothing'}"


class MegatronRun:
    """megatron.core's dist_checkpointing; which folder is the newest is the program's to know."""

    def __init__(self, ep_size: int) -> None:
        from tests.faults.stock.layers import megatron_layers

        self.model: Any = megatron_layers(None, HIDDEN, TOP_K, capacity=False, ep_size=ep_size).modules

    def _state(self) -> dict[str, Any]:
        from megatron.core.transformer.utils import sharded_state_dict_default

        found: dict[str, Any] = {}
        for index, module in enumerate(self.model):
            found |= sharded_state_dict_default(module, f"layer{index}.")
        return found

    def save(self, folder: Path, step: int) -> None:
        from megatron.core import dist_checkpointing

        target = folder / f"step{step}"
        if dist.get_rank() == 0:
            target.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(self._state(), str(target))

    def load(self, folder: Path) -> str:
        from megatron.core import dist_checkpointing

        newest = max(folder.iterdir()).name
        dist_checkpointing.load(self._state(), str(folder / newest))
        return f"loads {newest}"


RUNS = {"DeepSpeed": DeepSpeedRun, "Megatron": MegatronRun}


def end_while_writing() -> None:
    """SIGTERM, which a launcher sends to every rank, comes when half of the next file is written."""
    save = torch.save

    def save_half(content: object, target: Any, *arguments: Any, **options: Any) -> None:
        save(content, target, *arguments, **options)
        name = target if isinstance(target, str | Path) else getattr(target, "name", None)
        if isinstance(name, str | Path) and Path(name).is_file():
            with contextlib.suppress(OSError):
                os.truncate(name, Path(name).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGTERM)

    patch("torch.save", save_half).start()


def save_twice(framework: str, fault: str, folder: str) -> Found:
    """The second save goes wrong: on the odd rank (disk), on every rank (SIGTERM), or not at all."""
    run = RUNS[framework](dist.get_world_size())
    run.save(Path(folder), 1)
    dist.barrier()
    start = time.monotonic()
    if fault == "SIGTERM while saving":
        end_while_writing()
    elif fault == "disk full while saving" and dist.get_rank() == ODD:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_BYTES, SMALL_BYTES))
    try:
        run.save(Path(folder), 2)
    except Exception as error:  # noqa: BLE001  it is what is looked for
        return Found(first_line(error), time.monotonic() - start)
    return Found("no error", time.monotonic() - start)


def load(framework: str, fault: str, folder: str) -> Found:
    """In new processes."""
    ep_size = dist.get_world_size() // (2 if fault == "loads with another ep_size" else 1)
    start = time.monotonic()
    try:
        return Found(RUNS[framework](ep_size).load(Path(folder)), time.monotonic() - start)
    except Exception as error:  # noqa: BLE001  it is what is looked for
        return Found(first_line(error), time.monotonic() - start)
