"""Checkpoints of a run: find the last one, refuse another run's, save with `latest` written last, drop old ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from errors import ExampleError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from options import Options

TAG_PREFIX = "step"
NUM_KEPT = 2


def find(options: Options) -> int:
    """Return the step to continue from, 0 for a new start; collective over all ranks.

    Raises ExampleError when ranks see different checkpoints, or one that another model or number of ranks wrote.
    """
    folder = _folder(options)
    if options.resume == "never":
        _discard_all(folder)
    step = _agreed_step(folder)
    path = options.output / "run.json"
    now = {"num_ranks": dist.get_world_size(), **asdict(options.model)}
    before = json.loads(path.read_text(encoding="utf-8")) if step and path.exists() else now
    changed = [f"{name} was {before.get(name)}, now {now[name]}" for name in now if before.get(name) != now[name]]
    if changed:
        raise ExampleError(
            f"{options.output} holds a checkpoint of another run ({'; '.join(changed)}): use another --output, or "
            "--resume never to start over in this one"
        )
    dist.barrier()  # all ranks have read run.json
    if dist.get_rank() == 0:
        path.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    return step


def load(engine: DeepSpeedEngine, options: Options, step: int) -> None:
    """Load weights, optimizer and learning-rate schedule of a step that find returned; nothing for step 0."""
    if step == 0:
        return
    loaded, _ = engine.load_checkpoint(str(_folder(options)), tag=f"{TAG_PREFIX}{step}")
    if loaded is None:
        raise ExampleError(f"the checkpoint of step {step} in {_folder(options)} is incomplete: use --resume never")


def save(engine: DeepSpeedEngine, options: Options, step: int) -> None:
    """Save a step on every rank, then let the first rank drop all but the newest checkpoints."""
    folder = _folder(options)
    engine.save_checkpoint(str(folder), tag=f"{TAG_PREFIX}{step}")
    if dist.get_rank() == 0:
        for old in _saved_steps(folder)[:-NUM_KEPT]:
            shutil.rmtree(folder / f"{TAG_PREFIX}{old}")


def _folder(options: Options) -> Path:
    return options.output / "checkpoints"


def _agreed_step(folder: Path) -> int:
    """Return the step that `latest` names, 0 for none; ExampleError when ranks see different ones."""
    latest = folder / "latest"
    step = int(latest.read_text(encoding="utf-8").strip().removeprefix(TAG_PREFIX)) if latest.exists() else 0
    steps = [0] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ExampleError(
            f"{latest} names step {min(steps)} on some ranks and step {max(steps)} on others: --output must be one "
            "folder that all machines share"
        )
    return step


def _discard_all(folder: Path) -> None:
    """Remove a folder's checkpoints on the first rank before any rank goes on."""
    if dist.get_rank() == 0:
        (folder / "latest").unlink(missing_ok=True)
        for step in _saved_steps(folder):
            shutil.rmtree(folder / f"{TAG_PREFIX}{step}")
    dist.barrier()


def _saved_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix(TAG_PREFIX) for path in folder.glob(f"{TAG_PREFIX}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())
