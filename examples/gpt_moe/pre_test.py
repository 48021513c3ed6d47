"""Run one MoE layer through planmoe and through stock DeepSpeed with the same weights: compare, then time both.

    python3 -m torch.distributed.run --nproc_per_node=4 examples/gpt_moe/pre_test.py --batch_size=16

Exits with status 1, naming the tensor, when the two differ by more than rounding (or, with a codec, than its error).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from engine import import_planmoe, join_ranks, noise_in_file, planmoes_sentence
from errors import ExampleError
from launch_env import ProcessPlace, run_on_this_rank
from model import FeedForward
from options import RaisingParser

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCES = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 5e-3}
LOSSY_TOLERANCE = 5e-2
SEED = 1234


@dataclass
class Run:
    """One way through the layer: its engine, and the milliseconds of every measured step."""

    engine: DeepSpeedEngine
    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)


class OneLayer(nn.Module):
    """A model that is a single MoE layer: [batch, tokens, model_dim] to the same shape."""

    def __init__(self, arguments: argparse.Namespace, ep_size: int) -> None:
        super().__init__()
        self.moe = MoE(
            hidden_size=arguments.model_dim,
            expert=FeedForward(arguments.model_dim, arguments.hidden_size),
            num_experts=arguments.num_local_experts * ep_size,
            ep_size=ep_size,
            k=arguments.top,
            capacity_factor=arguments.capacity_factor,
            eval_capacity_factor=arguments.capacity_factor,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the layer and drop its balance loss and counts."""
        out: Tensor = self.moe(hidden)[0]
        return out


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; ExampleError for a value that cannot work."""
    parser = RaisingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16, help="samples per rank (%(default)s)")
    parser.add_argument("--num_tokens", type=int, default=512, help="tokens per sample (%(default)s)")
    parser.add_argument("--model_dim", type=int, default=256, help="width of a token (%(default)s)")
    parser.add_argument("--hidden_size", type=int, default=512, help="inner width of an expert (%(default)s)")
    parser.add_argument("--num_local_experts", type=int, default=2, help="experts per rank (%(default)s)")
    parser.add_argument("--top", type=int, default=2, help="experts per token (%(default)s)")
    parser.add_argument("--capacity_factor", type=float, default=1.25, help="room per expert (%(default)s)")
    parser.add_argument("--chunks", type=int, default=2, help="chunks of the pipeline (%(default)s)")
    parser.add_argument("--comm", default="direct", help="all-to-all algorithm (%(default)s)")
    parser.add_argument("--compression", default="none", help="codec on the wire (%(default)s)")
    parser.add_argument("--num_steps", type=int, default=10, help="measured steps (%(default)s)")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default="float32", help="of weights and tokens (%(default)s)"
    )
    parser.add_argument("--tolerance", type=float, help="largest relative error (default: by dtype and compression)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("batch_size", "num_tokens", "model_dim", "hidden_size", "num_local_experts", "top", "num_steps"):
        if getattr(arguments, name) < 1:
            raise ExampleError(f"--{name} is {getattr(arguments, name)}: it must be at least 1")
    return arguments


def start_engine(arguments: argparse.Namespace, planmoe: bool | dict[str, Any]) -> DeepSpeedEngine:
    """Build the layer with the same weights every time and hand it to DeepSpeed, which moves it to the device."""
    torch.manual_seed(SEED)
    layer = OneLayer(arguments, dist.get_world_size())
    for number, parameter in enumerate(layer.moe.deepspeed_moe.experts.parameters()):
        generator = torch.Generator().manual_seed(SEED + 1000 * dist.get_rank() + number)
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": arguments.batch_size,
        "steps_per_print": 1_000_000_000,
        "planmoe": planmoe,
    }
    with planmoes_sentence():
        engine, *_ = deepspeed.initialize(model=layer.to(DTYPES[arguments.dtype]), config=config)
    return engine


def run_step(run: Run, tokens: Tensor, output_gradient: Tensor) -> dict[str, Tensor]:
    """Run forward and backward once, add their times to the run, and return output and gradients by name."""
    layer = run.engine.module
    layer.zero_grad()
    leaf = tokens.clone().requires_grad_()
    torch.manual_seed(SEED + dist.get_rank())  # the noise of top-2 gates
    dist.barrier()
    marks = [_now()]
    output = layer(leaf)
    marks.append(_now())
    output.backward(output_gradient)
    marks.append(_now())
    run.forward_ms.append((marks[1] - marks[0]) * 1e3)
    run.backward_ms.append((marks[2] - marks[1]) * 1e3)
    experts = layer.moe.deepspeed_moe.experts.parameters()
    gradients = torch.cat(
        [torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in experts]
    )
    router = layer.moe.deepspeed_moe.gate.wg.weight.grad
    return {
        "output": output.detach(),
        "input gradient": leaf.grad,
        "router gradient": router,
        "expert gradients": gradients,
    }


def relative_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return, per tensor, the largest difference over all ranks relative to the largest expected value there."""
    errors = {}
    for name, reference in expected.items():
        difference = (found[name].double() - reference.double()).abs().max()
        largest = torch.stack([difference, reference.double().abs().max()])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        # NaN must not pass: it is larger than no tolerance.
        errors[name] = float("inf") if largest.isnan().any() else float(largest[0] / largest[1].clamp_min(1e-30))
    return errors


def report(arguments: argparse.Namespace, runs: dict[str, Run], num_bytes: tuple[float, float]) -> None:
    """Print the two ways side by side: median milliseconds of forward, backward and both, and MiB sent."""
    planmoe, stock = runs["planmoe"], runs["stock"]
    num_experts = arguments.num_local_experts * dist.get_world_size()
    print(
        f"{dist.get_world_size()} ranks on {get_accelerator().device_name()}, {arguments.dtype}, "
        f"{arguments.batch_size} x {arguments.num_tokens} tokens per rank, {arguments.model_dim} wide, "
        f"{num_experts} experts of {arguments.hidden_size}, top {arguments.top}, "
        f"capacity factor {arguments.capacity_factor:g}; "
        f"comm {arguments.comm}, {arguments.chunks} chunks, compression {arguments.compression}\n"
    )
    rows = [
        ("forward, ms", statistics.median(planmoe.forward_ms), statistics.median(stock.forward_ms)),
        ("backward, ms", statistics.median(planmoe.backward_ms), statistics.median(stock.backward_ms)),
        ("forward + backward, ms", _median_step(planmoe), _median_step(stock)),
        ("sent per rank and step, MiB", *num_bytes),
    ]
    title = f"median of {arguments.num_steps} steps, rank 0"
    print(f"{title:<30} {'planmoe':>12} {'stock':>12} {'stock/planmoe':>15}")
    for name, ours, theirs in rows:
        print(f"{name:<30} {ours:>12.2f} {theirs:>12.2f} {theirs / ours if ours else float('nan'):>15.2f}")
    print()


def measure(arguments: argparse.Namespace, runs: dict[str, Run]) -> dict[str, float]:
    """Compare one step of both ways, then time num_steps of each in turn; return the relative errors by tensor."""
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    shape = (arguments.batch_size, arguments.num_tokens, arguments.model_dim)
    device, dtype = runs["stock"].engine.device, DTYPES[arguments.dtype]
    tokens, output_gradient = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    results = {name: run_step(one, tokens, output_gradient) for name, one in runs.items()}
    errors = relative_errors(results["planmoe"], results["stock"])
    for one in runs.values():
        one.forward_ms.clear()  # the first step also allocates and connects
        one.backward_ms.clear()
    runs["planmoe"].engine.planmoe.recorder.take()
    for _ in range(arguments.num_steps):
        for one in runs.values():
            run_step(one, tokens, output_gradient)
    return errors


def run(place: ProcessPlace) -> int:
    """Compare and time the two ways on all ranks; return the exit status."""
    arguments = parse_arguments()
    import_planmoe()
    section = {"comm": arguments.comm, "chunks": arguments.chunks, "compression": arguments.compression}
    with noise_in_file(Path(os.devnull)):
        join_ranks(place)
        runs = {"planmoe": Run(start_engine(arguments, section)), "stock": Run(start_engine(arguments, planmoe=False))}
    errors = measure(arguments, runs)
    stats = runs["planmoe"].engine.planmoe.recorder.take()
    scale = arguments.num_steps * 2**20
    tolerance = arguments.tolerance
    if tolerance is None:
        tolerance = max(TOLERANCES[arguments.dtype], 0.0 if arguments.compression == "none" else LOSSY_TOLERANCE)
    failures = [name for name, error in errors.items() if error > tolerance]
    if place.rank == 0:
        report(arguments, runs, (stats.bytes_sent / scale, stats.stock_bytes / scale))
        for name, error in errors.items():
            print(f"max relative error of {name:<17} {error:9.2e}  {'FAILED' if name in failures else 'ok'}")
        print(f"{'FAILED: ' + ', '.join(failures) if failures else 'PASSED'} (tolerance {tolerance:g})")
    dist.destroy_process_group()
    return 1 if failures else 0


def _now() -> float:
    get_accelerator().synchronize()
    return time.perf_counter()


def _median_step(run: Run) -> float:
    return statistics.median(sum(pair) for pair in zip(run.forward_ms, run.backward_ms, strict=True))


if __name__ == "__main__":
    sys.exit(run_on_this_rank(run, Path(__file__).name))
