"""A whole MoE layer on one GPU, forward and backward, against its experts alone: python -m benchmarks.layer [--quick].

Experts alone: torch's own grouped GEMM and autograd on rows that are already in order and two weights for all experts,
with the gradients of rows and weights. Medians of device time of five steps in a row, divided by five; both take turns.
Then the layers of DeepSpeed, with planmoe in it and without, Megatron and Tutel, where installed, with their routers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks._layer_cases import SHAPES, Shape, make_experts, median_ms, routing
from benchmarks._layer_peers import Maker, installed_peers
from planmoe_ds.codecs import make_codecs
from planmoe_ds.compression import CompressionConfig
from planmoe_ds.config import parse_config
from planmoe_ds.connect import connect
from planmoe_ds.equal_experts import share_storage
from planmoe_ds.experts import LocalExperts
from planmoe_ds.grouped import stacked
from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.plan import Routes
from planmoe_ds.recorder import Recorder


def make_layer(settings: dict[str, object]) -> ExpertParallelLayer:
    """A layer of this one rank."""
    config, device = parse_config(settings), torch.device("cuda", 0)
    group = connect({"experts": [0]}, config, device)["experts"]
    assert isinstance(config.compression, CompressionConfig)
    codecs = make_codecs(config.compression)
    return ExpertParallelLayer(index=0, config=config, group=group, codecs=codecs, recorder=Recorder(device))


class LayerRun:
    """One shape's layer and its experts alone, on the same parameters."""

    def __init__(self, shape: Shape, layer: ExpertParallelLayer) -> None:
        self.shape, self.layer = shape, layer
        self.modules = make_experts(shape)
        share_storage(self.modules)
        self.expert_KT, self.weight_KT = routing(shape)
        self.tokens = torch.randn(shape.tokens, shape.hidden, device="cuda").bfloat16().requires_grad_()
        self.weight_KT.requires_grad_()
        self.probe = torch.randn(shape.tokens, shape.hidden, device="cuda").bfloat16()
        counts = torch.bincount(self.expert_KT.flatten(), minlength=shape.experts)
        self.ends = counts.cumsum(0)
        rows = shape.tokens * shape.top_k
        self.rows = torch.randn(rows, shape.hidden, device="cuda").bfloat16().requires_grad_()
        self.row_probe = torch.randn(rows, shape.hidden, device="cuda").bfloat16()
        self.weights = [
            stacked([module.get_submodule(name).weight for module in self.modules]).transpose(1, 2).requires_grad_()
            for name in ("0", "2")
        ]

    def _clear(self) -> None:
        self.tokens.grad = self.weight_KT.grad = self.rows.grad = None
        for module in self.modules:
            for parameter in module.parameters():
                parameter.grad = None

    def forward(self) -> torch.Tensor:
        """The layer's output."""
        shape = self.shape
        slots = torch.zeros_like(self.expert_KT)
        routes = Routes(self.expert_KT, slots, self.weight_KT, shape.experts, shape.tokens)
        return self.layer.forward(self.tokens, routes, LocalExperts(self.modules, nn.Identity()))

    def both(self) -> None:
        """Forward and backward of the layer."""
        self._clear()
        self.forward().backward(self.probe)

    def experts_forward(self) -> torch.Tensor:
        """The experts' output on rows in order."""
        ends = self.ends.to(torch.int32)
        hidden = torch._grouped_mm(self.rows, self.weights[0], offs=ends)
        return torch._grouped_mm(functional.gelu(hidden), self.weights[1], offs=ends)

    def experts_both(self) -> None:
        """Forward and backward of the experts alone."""
        self.rows.grad = self.weights[0].grad = self.weights[1].grad = None
        self.experts_forward().backward(self.row_probe)


def measure(shape: Shape, layer: ExpertParallelLayer, rounds: int) -> dict[str, float]:
    """Milliseconds, and the layer's time over its experts'."""
    run = LayerRun(shape, layer)
    times: dict[str, list[float]] = {}
    for _ in range(4):  # interleaved
        for name, call in (("experts", run.experts_both), ("layer", run.both)):
            times.setdefault(name, []).append(median_ms(call, max(2, rounds // 4), calls=5))
    single = median_ms(run.both, rounds)  # the host's work shows where the device waits for it
    with torch.no_grad():
        forward, alone = (median_ms(call, rounds, calls=5) for call in (run.forward, run.experts_forward))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        f"{shape.name}_experts_ms": medians["experts"],
        f"{shape.name}_layer_ms": medians["layer"],
        f"{shape.name}_layer_single_ms": single,
        f"{shape.name}_experts_forward_ms": alone,
        f"{shape.name}_layer_forward_ms": forward,
        f"layer_{shape.name}_over_experts": medians["layer"] / medians["experts"],
    }


def measure_peers(shape: Shape, experts_ms: float, rounds: int) -> dict[str, float]:
    """Other systems' time over the experts'; one that cannot run here is named with its error and left out."""
    figures = {}
    for name, make in installed_peers():
        try:
            figures[f"{shape.name}: {name} over experts"] = peer_ms(make, shape, rounds) / experts_ms
        except Exception as error:  # noqa: BLE001  whatever another system fails with
            print(f"{shape.name}: {name} does not run here: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    return figures


def peer_ms(make: Maker, shape: Shape, rounds: int) -> float:
    """Milliseconds of a layer's forward and backward."""
    tokens = torch.randn(shape.tokens, shape.hidden, device="cuda").bfloat16().requires_grad_()
    probe = torch.randn_like(tokens)
    module, forward = make(shape, tokens.device)

    def both() -> None:
        tokens.grad = None
        module.zero_grad(set_to_none=True)
        forward(tokens).backward(probe)

    return median_ms(both, rounds, warmup=3, calls=2)


def main() -> None:
    """Measure, print, and write what --json names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller shapes, fewer rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--profile", type=Path, help="write a table of the kernels of one step to this file")
    options = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29655")
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    layer = make_layer({"exactness": "reordered"})
    figures: dict[str, float] = {}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, {layer.config.resolved_exactness.value}")
    shapes = [shape.smaller() for shape in SHAPES] if options.quick else SHAPES
    for shape in shapes:
        found = measure(shape, layer, 5 if options.quick else 20)
        found |= measure_peers(shape, found[f"{shape.name}_experts_ms"], 3 if options.quick else 8)
        for name, value in found.items():
            print(f"{name:35} {value:9.3f}", flush=True)
        figures |= found
    if options.profile is not None:
        options.profile.write_text("\n\n".join(profile(LayerRun(shape, layer)) for shape in shapes))
    for shape in shapes:
        name = f"layer_{shape.name}_over_experts"
        print(f"RESULT {name}={figures[name]:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), **figures}, indent=1))
    dist.destroy_process_group()


def profile(run: LayerRun) -> str:
    """Kernels of one step, by time."""
    for _ in range(3):
        run.both()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        run.both()
        torch.cuda.synchronize()
    return f"{run.shape}\n{found.key_averages().table(sort_by='self_cuda_time_total', row_limit=40)}"


if __name__ == "__main__":
    main()
