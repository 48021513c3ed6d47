"""Pretrain a small GPT-MoE with megatron.core and planmoe; runs under torchrun, mpirun or srun.

torchrun --nproc_per_node=4 examples/gpt_moe/pretrain_megatron.py --moe-token-dispatcher planmoe
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import checkpoint
from data import ByteData, load_bytes
from evaluate import generate_text, validation_loss
from files import make_folder
from history import History, StepRecord, read_history
from launch_env import ProcessPlace, run_on_this_rank
from megatron_engine import MegatronEngine, join_ranks, start_engine
from megatron_options import Options, parse_options
from progress import LiveNumbers, LiveProgress
from report import Outcome, describe_sharing, write_report

MEASURED = ("bytes_sent", "stock_bytes", "exposed_seconds", "communication_seconds", "expert_seconds")


def run(place: ProcessPlace) -> int:
    """Train, or evaluate a run that is complete, and write the report on all ranks; return the exit status."""
    warnings.filterwarnings("ignore")  # Megatron's, about everything that is not there on a CPU
    options: Any = parse_options(None, place.world_size)
    data = load_bytes(options.data, options.model.sequence_length)
    report_folder = make_folder(options.output / "report", "--save")
    device = join_ranks(place, options)
    first_step = checkpoint.find(options)
    engine: Any = start_engine(options, device)
    checkpoint.load(engine, options, first_step)
    history = History(read_history(report_folder / "metrics.csv", first_step))
    announce(engine, options, data, first_step)
    train(engine, options, data, history, first_step)
    outcome = Outcome(
        validation_loss=validation_loss(engine, data, options, data_part(options)),
        sample=generate_text(engine, options),
        world_size=place.world_size,
        device=device.type,
        num_parameters=count_parameters(engine, options),
        planmoe=describe_planmoe(engine),
        stock="Megatron's all-to-all",
    )
    if place.rank == 0:
        write_report(report_folder, options, history.records, outcome)
        print(f"\n{outcome.sample}\n\nvalidation loss {outcome.validation_loss:.3f} nats per byte; report: "
              f"{report_folder / 'summary.md'}")  # fmt: skip
    dist.destroy_process_group()
    return 0


def data_part(options: Options) -> tuple[int, int]:
    """This rank's number among the data-parallel ranks, and their number; tensor-parallel ranks share data."""
    return dist.get_rank() // options.model.tp_size, dist.get_world_size() // options.model.tp_size


def describe_planmoe(engine: MegatronEngine) -> str:
    """One line on what carries the tokens."""
    session = getattr(engine.model, "planmoe", None)
    if session is None:
        return "off (Megatron's all-to-all)"
    return f"on, {session.num_layers} layers, {session.config.model_dump_json(exclude_none=True, exclude={'enabled'})}"


def count_parameters(engine: MegatronEngine, options: Options) -> int:
    """Parameters of the whole model, the experts of other ranks included (dense ones as tensor-parallel rank 0)."""
    counts = [(param.numel(), ".experts." in name) for name, param in engine.model.named_parameters()]
    return sum(count * (options.model.ep_size if is_expert else 1) for count, is_expert in counts)


def announce(engine: MegatronEngine, options: Options, data: ByteData, first_step: int) -> None:
    """Say on the first rank what is about to run."""
    if dist.get_rank() != 0:
        return
    model = options.model
    num_bytes = data.training.numel() + data.validation.numel()
    print(f"data     {data.num_files} files, {num_bytes / 1e6:.1f} MB")
    print(
        f"model    {model.num_layers} layers, hidden {model.hidden_size}, {model.num_experts} experts, "
        f"top {model.top_k}, {count_parameters(engine, options) / 1e6:.1f} M parameters"
    )
    num_ranks = dist.get_world_size()
    print(f"ranks    {num_ranks} on {engine.device.type}, {describe_sharing(model.ep_size, num_ranks)}")
    print(f"planmoe  {describe_planmoe(engine)}")
    if first_step >= options.steps:
        print(f"this run is complete at step {first_step}: evaluating it. Train on with larger --train-iters")
    elif first_step:
        print(f"resuming after step {first_step}")
    sys.stdout.flush()


def train(engine: Any, options: Any, data: ByteData, history: History, first_step: int) -> None:
    """Train from first_step to options.steps, saving on the way; the last step's timeline goes into the report."""
    report_folder = options.output / "report"
    session = getattr(engine.model, "planmoe", None)
    progress = LiveProgress(
        total=options.steps, first_step=first_step, log_every=options.log_every, is_shown=dist.get_rank() == 0
    )
    with progress:
        for step in range(first_step + 1, options.steps + 1):
            is_last = step == options.steps
            if is_last and session is not None:
                session.recorder.start_trace()
            record = train_step(engine, options, data, step)
            if is_last and session is not None:
                write_timeline(session, report_folder, f"Training step {step}, rank 0 of {dist.get_world_size()}")
            history.add(record)
            share = record.exposed_seconds / record.seconds if session is not None else None
            progress.show(step, LiveNumbers(record.loss, record.tokens_per_second, share))
            if is_last or (options.save_every and step % options.save_every == 0):
                history.merge_ranks(engine.device, report_folder / "metrics.csv")
                checkpoint.save(engine, options, step)


def train_step(engine: MegatronEngine, options: Options, data: ByteData, step: int) -> StepRecord:
    """Run one optimizer step, numbered from 1, and return what this rank measured."""
    started = time.perf_counter()
    number, num_parts = data_part(options)
    count, rate = options.num_micro_batches, engine.learning_rate
    batches = []
    for micro_batch in range(count):
        index = (step * count + micro_batch) * num_parts + number
        pair = data.batch("training", index, options.batch_shape, options.model.seed)
        batches.append((pair[0].to(engine.device), pair[1].to(engine.device)))
    loss = engine.step(batches)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    session = getattr(engine.model, "planmoe", None)
    measured = {} if session is None else {name: getattr(stats, name) for stats in (session.recorder.take(),)
                                           for name in MEASURED}  # fmt: skip
    num_tokens = options.batch_size * options.model.sequence_length * count * num_parts
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=rate,
        seconds=seconds,
        tokens_per_second=num_tokens / seconds,
        **measured,
    )


def write_timeline(session: Any, folder: Path, title: str) -> None:
    """Stop recording and, on the first rank, write timeline.png and timeline.json into the folder."""
    from planmoe_ds.trace import draw_timeline, write_chrome_trace

    spans = session.recorder.stop_trace()
    if spans and dist.get_rank() == 0:
        draw_timeline(spans, folder / "timeline.png", title)
        write_chrome_trace(spans, folder / "timeline.json")


if __name__ == "__main__":
    sys.exit(run_on_this_rank(run, Path(__file__).name))
