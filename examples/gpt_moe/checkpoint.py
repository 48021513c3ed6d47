"""Checkpoints of a run: find the last one, refuse another run's, save whole or not at all, drop old ones.

A checkpoint is written aside by all ranks; the first one then renames it, and lets `latest` name it last. So `latest`
names a whole checkpoint at every moment, and a run that was ended while it saved goes on from the one before.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from errors import ExampleError, LoneError
from files import publish_folder, write_whole

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from options import Options

TAG_PREFIX = "step"
NUM_KEPT = 2
UNFINISHED = "unfinished"  # where ranks write; what is left there by a run that was ended means nothing
_WRITE_ERRORS = ("PytorchStreamWriter", "inline_container", "file write failed")  # of torch.save, when a disk is full


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
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        write_whole(path, json.dumps(now, indent=1) + "\n")
    return step


def load(engine: DeepSpeedEngine, options: Options, step: int) -> None:
    """Load weights, optimizer and learning-rate schedule of a step that find returned; nothing for step 0."""
    if step == 0:
        return
    loaded, _ = engine.load_checkpoint(str(_folder(options)), tag=f"{TAG_PREFIX}{step}")
    if loaded is None:
        raise ExampleError(f"the checkpoint of step {step} in {_folder(options)} is incomplete: use --resume never")


def save(engine: DeepSpeedEngine, options: Options, step: int) -> None:
    """Save a step on every rank, then let the first rank publish it and drop all but the newest; collective.

    Raises LoneError on a rank that cannot write: the checkpoint before stays the latest.
    """
    folder = _folder(options)
    try:
        engine.save_checkpoint(str(folder / UNFINISHED), tag=f"{TAG_PREFIX}{step}")
        if dist.get_rank() == 0:
            _publish(folder, f"{TAG_PREFIX}{step}")
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not any(words in str(error) for words in _WRITE_ERRORS):
            raise  # something else than the disk, such as another rank that ended
        raise LoneError(_why_not_saved(folder, step, error)) from error
    dist.barrier()


def _publish(folder: Path, tag: str) -> None:
    draft = folder / UNFINISHED
    shutil.rmtree(folder / tag, ignore_errors=True)  # of a run that went on after this step and started over before it
    publish_folder(draft / tag, folder / tag)
    for path in draft.iterdir():  # DeepSpeed's script that makes one file of a checkpoint
        if path.name != "latest":
            path.replace(folder / path.name)
    write_whole(folder / "latest", tag)
    shutil.rmtree(draft)
    # Later ones are of a run that went on further: they stay until this one gets there.
    until_now = [step for step in _saved_steps(folder) if step <= int(tag.removeprefix(TAG_PREFIX))]
    for old in until_now[:-NUM_KEPT]:
        shutil.rmtree(folder / f"{TAG_PREFIX}{old}")


def _why_not_saved(folder: Path, step: int, error: Exception) -> str:
    latest = folder / "latest"
    tag = latest.read_text(encoding="utf-8") if latest.exists() else ""
    kept = f"the one of {tag} is whole, and the same command goes on from it" if tag else "none was written before"
    free = shutil.disk_usage(folder).free >> 20
    reason = str(error).splitlines()[0]
    return (
        f"rank {dist.get_rank()} cannot write the checkpoint of step {step} into {folder}: {reason} ({free} MiB are "
        f"free there). Make room, or raise the limit on the size of files; {kept}"
    )


def _folder(options: Options) -> Path:
    return options.output / "checkpoints"


def _agreed_step(folder: Path) -> int:
    """Return the step that `latest` names, 0 for none; ExampleError when ranks see different ones."""
    latest = folder / "latest"
    tag = latest.read_text(encoding="utf-8").strip() if latest.exists() else f"{TAG_PREFIX}0"
    number = tag.removeprefix(TAG_PREFIX)
    step = int(number) if number.isdecimal() else -1
    steps = [0] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise ExampleError(
            f"{latest} names step {min(steps)} on some ranks and step {max(steps)} on others: --output must be one "
            "folder that all machines share"
        )
    if step < 0 or (step > 0 and not (folder / tag).is_dir()):
        raise ExampleError(
            f"{latest} names {tag!r}, which is not a checkpoint in {folder}: write the name of one that is there into "
            "it, or use --resume never to start over"
        )
    return step


def _discard_all(folder: Path) -> None:
    """Remove a folder's checkpoints on the first rank before any rank goes on."""
    if dist.get_rank() == 0:
        (folder / "latest").unlink(missing_ok=True)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
        for step in _saved_steps(folder):
            shutil.rmtree(folder / f"{TAG_PREFIX}{step}")
    dist.barrier()


def _saved_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix(TAG_PREFIX) for path in folder.glob(f"{TAG_PREFIX}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())
