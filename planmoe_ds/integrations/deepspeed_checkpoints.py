"""DeepSpeed's checkpoints say how experts were shared, so that another expert-parallel size is refused by name.

DeepSpeed keeps experts' weights by their number, which any expert-parallel size can load, but optimizer states by rank.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from planmoe_ds.errors import PlanMoEConfigError

FILE = "planmoe.json"  # in the folder of a checkpoint's tag
_KEY = "expert_parallel_sizes"


def watch_checkpoints(engine: Any, expert_parallel_sizes: list[int], check: Callable[[], None]) -> None:
    """Let the engine's save_checkpoint write the sizes, one per MoE layer, and its load_checkpoint compare them.

    expert_parallel_sizes: of the layers of this rank's pipeline stage; collective, since the file has those of all.

    load_checkpoint then raises PlanMoEConfigError, on every rank, where optimizer states of other sizes are asked for;
    with load_module_only or load_optimizer_states=False it loads the weights. A checkpoint without the file, which
    planmoe did not write, is not looked at. check: called before anything is saved; raises where weights may come from
    exchanges that were ended.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint
    expert_parallel_sizes = _of_all_stages(getattr(engine, "stage_id", 0), expert_parallel_sizes)

    @functools.wraps(save)
    def save_checkpoint(save_dir: str, tag: Any = None, *args: Any, **kwargs: Any) -> Any:
        check()
        rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
        if save_dir and rank == 0:
            folder = Path(save_dir) / (f"global_step{engine.global_steps}" if tag is None else str(tag))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE).write_text(json.dumps({_KEY: expert_parallel_sizes}))
        return save(save_dir, tag, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(
        load_dir: str,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        if load_optimizer_states and not load_module_only and not engine.load_universal_checkpoint():
            _compare(Path(load_dir), tag, expert_parallel_sizes)
        return load(
            load_dir, tag, load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only,
            custom_load_fn,
        )  # fmt: skip

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def _of_all_stages(stage: int, sizes: list[int]) -> list[int]:
    """One stage's after another's."""
    told: list[tuple[int, list[int]]] = [(stage, sizes)] * dist.get_world_size()
    dist.all_gather_object(told, (stage, sizes))
    return [size for _, of_stage in sorted(dict(told).items()) for size in of_stage]


def _compare(load_dir: Path, tag: Any, sizes: list[int]) -> None:
    latest = load_dir / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    file = load_dir / str(tag) / FILE
    if not file.is_file():
        return
    try:
        written = json.loads(file.read_text())[_KEY]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise PlanMoEConfigError(
            f"{file} cannot be read ({error}); it says how the checkpoint's experts were shared. Without the file it "
            "is not checked"
        ) from None
    if written != sizes:
        raise PlanMoEConfigError(
            f"the checkpoint in {file.parent} was written with expert-parallel size {_words(written)}, this run has "
            f"{_words(sizes)}: DeepSpeed keeps optimizer states by expert-parallel rank, and they do not fit. Run with "
            "the size it was written with, or call load_checkpoint(..., load_module_only=True), which loads the "
            "experts by their number and starts the optimizer anew"
        )


def _words(sizes: Any) -> str:
    """One number where all layers have the same."""
    if isinstance(sizes, list) and len(set(map(str, sizes))) == 1:
        return str(sizes[0])
    return f"{sizes} by layer"
