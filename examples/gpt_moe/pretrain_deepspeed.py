"""Pretrain a small GPT-MoE with DeepSpeed and planmoe; runs under torchrun, deepspeed, mpirun or srun.

torchrun --nproc_per_node=4 examples/gpt_moe/pretrain_deepspeed.py --planmoe on
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

import checkpoint
import engine as engines
from data import ByteData, language_loss, load_bytes
from evaluate import generate_text, validation_loss
from files import make_folder
from history import History, StepRecord, read_history
from launch_env import ProcessPlace, run_on_this_rank
from options import Options, parse_options
from progress import LiveNumbers, LiveProgress
from report import Outcome, describe_sharing, write_report

BALANCE_LOSS_WEIGHT = 0.01


def run(place: ProcessPlace) -> int:
    """Train, or evaluate a run that is complete, and write the report on all ranks; return the exit status."""
    options = parse_options(None, place.world_size)
    data = load_bytes(options.data, options.model.sequence_length)
    report_folder = make_folder(options.output / "report", "--output")
    with engines.noise_in_file(options.output / f"setup_rank{place.rank}.log"):
        engines.join_ranks(place)
        first_step = checkpoint.find(options)
        engine = engines.start_engine(options, place)
        checkpoint.load(engine, options, first_step)
    history = History(read_history(report_folder / "metrics.csv", first_step))
    announce(engine, options, data, first_step)
    train(engine, options, data, history, first_step)
    loss = validation_loss(engine, data, options)
    outcome = Outcome(
        validation_loss=loss,
        sample=generate_text(engine, options),
        world_size=place.world_size,
        device=get_accelerator().device_name(),
        num_parameters=engines.count_parameters(engine, options),
        planmoe=engines.describe_planmoe(engine),
    )
    if place.rank == 0:
        write_report(report_folder, options, history.records, outcome)
        print(f"\n{outcome.sample}\n\nvalidation loss {loss:.3f} nats per byte; report: {report_folder / 'summary.md'}")
    dist.destroy_process_group()
    return 0


def announce(engine: DeepSpeedEngine, options: Options, data: ByteData, first_step: int) -> None:
    """Say on the first rank what is about to run."""
    if dist.get_rank() != 0:
        return
    model = options.model
    num_held_out = data.validation.numel()
    num_bytes = data.training.numel() + num_held_out
    num_parameters = engines.count_parameters(engine, options)
    print(f"data     {data.num_files} files, {num_bytes / 1e6:.1f} MB, {num_held_out / 1e6:.1f} MB of them held out")
    print(
        f"model    {model.num_layers} layers, hidden {model.hidden_size}, {model.num_experts} experts, "
        f"top {model.top_k}, {num_parameters / 1e6:.1f} M parameters"
    )
    num_ranks = dist.get_world_size()
    print(f"ranks    {num_ranks} on {get_accelerator().device_name()}, {describe_sharing(model.ep_size, num_ranks)}")
    print(f"planmoe  {engines.describe_planmoe(engine)}")
    if first_step >= options.steps:
        print(f"this run is complete at step {first_step}: evaluating it. Train on with --steps above {first_step}")
    elif first_step:
        print(f"resuming after step {first_step}")
    sys.stdout.flush()


def train(engine: DeepSpeedEngine, options: Options, data: ByteData, history: History, first_step: int) -> None:
    """Train from first_step to options.steps, saving on the way; the last step's timeline goes into the report."""
    report_folder = options.output / "report"
    progress = LiveProgress(
        total=options.steps, first_step=first_step, log_every=options.log_every, is_shown=dist.get_rank() == 0
    )
    with progress:
        for step in range(first_step + 1, options.steps + 1):
            is_last = step == options.steps
            if is_last:
                engines.start_trace(engine)
            record = train_step(engine, options, data, step)
            if is_last:
                engines.write_timeline(
                    engine, report_folder, f"Training step {step}, rank 0 of {dist.get_world_size()}"
                )
            history.add(record)
            share = record.exposed_seconds / record.seconds if hasattr(engine, "planmoe") else None
            progress.show(step, LiveNumbers(record.loss, record.tokens_per_second, share))
            if is_last or (options.save_every and step % options.save_every == 0):
                history.merge_ranks(engine.device, report_folder / "metrics.csv")
                checkpoint.save(engine, options, step)


def train_step(engine: DeepSpeedEngine, options: Options, data: ByteData, step: int) -> StepRecord:
    """Run one optimizer step, numbered from 1, and return what this rank measured."""
    started = time.perf_counter()
    num_micro_batches, world_size = engine.gradient_accumulation_steps(), dist.get_world_size()
    mean_loss = 0.0
    for micro_batch in range(num_micro_batches):
        index = (step * num_micro_batches + micro_batch) * world_size + dist.get_rank()
        inputs, targets = data.batch("training", index, options.batch_shape, options.model.seed)
        torch.manual_seed(options.model.seed + index)  # gates may draw noise: a resumed run draws the same
        logits, balance_loss = engine(inputs.to(engine.device))
        loss = language_loss(logits, targets.to(engine.device))
        engine.backward(loss + BALANCE_LOSS_WEIGHT * balance_loss)
        engine.step()
        mean_loss += loss.item() / num_micro_batches
    get_accelerator().synchronize()
    seconds = time.perf_counter() - started
    return StepRecord(
        step=step,
        loss=mean_loss,
        learning_rate=engine.get_lr()[0],
        seconds=seconds,
        tokens_per_second=inputs.numel() * num_micro_batches * world_size / seconds,
        **engines.communication_numbers(engine),
    )


if __name__ == "__main__":
    sys.exit(run_on_this_rank(run, Path(__file__).name))
