"""Small layers for the fault tests: two of them over all ranks, with real experts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.watchdog import PERIOD_SECONDS
from tests.engine.support import make_layer, rank_device, routes_of, run_layer

HIDDEN = 16
NUM_EXPERTS = 8
SETTINGS: dict[str, object] = {"chunks": 2, "timeout_seconds": 30}


class Model:
    """Two MoE layers, one after the other, on this rank."""

    def __init__(self, settings: dict[str, object] | None = None) -> None:
        merged = {**SETTINGS, **(settings or {})}
        self.layers = make_layers(merged, 2)
        torch.manual_seed(3)
        experts = [nn.Linear(HIDDEN, HIDDEN).to(rank_device()) for _ in range(2 * NUM_EXPERTS)]
        rank, size = dist.get_rank(), dist.get_world_size()
        share = NUM_EXPERTS // size
        first = [index * NUM_EXPERTS + rank * share for index in range(2)]
        self.experts = [experts[start : start + share] for start in first]

    def layer(self, index: int, tokens: torch.Tensor, expert_KT: torch.Tensor) -> torch.Tensor:
        """One layer's output [T, H]."""
        return run_layer(self.layers[index], tokens, routes_of(expert_KT, NUM_EXPERTS), self.experts[index])

    def forward(self, tokens: torch.Tensor, expert_KT: torch.Tensor) -> torch.Tensor:
        """Both layers."""
        return self.layer(1, self.layer(0, tokens, expert_KT), expert_KT)


def make_layers(settings: dict[str, object], count: int) -> list[ExpertParallelLayer]:
    """Layers 0, 1, … over one group of all ranks; collective."""
    first = make_layer(settings)
    others = [
        ExpertParallelLayer(
            index=index, config=first.config, group=first.group, codecs=first.codecs, recorder=first.recorder
        )
        for index in range(1, count)
    ]
    return [first, *others]


def batch(num_tokens: int = 12, top_k: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's tokens [T, H] and experts [K, T]; every rank has tokens for every other."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = torch.randn(num_tokens, HIDDEN, generator=generator).to(rank_device())
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).to(rank_device())
    return tokens.requires_grad_(), scores.topk(top_k, dim=1).indices.t().contiguous()


def die(*_: object) -> None:
    """As by the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Until all other ranks are `done` and this one's watchdog has heard why, or for 40 s."""
    for _ in range(400):
        if _store().add("done", 0) == dist.get_world_size() - 1:
            break
        time.sleep(0.1)
    time.sleep(4 * PERIOD_SECONDS)


def done() -> None:
    """Nobody has to hang for this rank any more."""
    _store().add("done", 1)


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


class _BackwardCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, action):  # type: ignore[no-untyped-def]
        ctx.action = action
        return values.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.action()
        return grad, None


def in_backward(values: torch.Tensor, action: Callable[[], None]) -> torch.Tensor:
    """`values`, with `action` called when their gradient arrives."""
    return _BackwardCall.apply(values, action)


def notice(model: Model) -> None:
    """As a program on GPUs learns what went wrong: its host ran ahead; it waits for the device and calls a layer."""
    if rank_device().type == "cuda":
        torch.cuda.synchronize()
        model.layer(0, *batch())


def seconds_until_error(function: Callable[[], object]) -> tuple[float, str, str]:
    """Seconds, class and message of the error that `function` ends with; class "" when there was none."""
    start = time.monotonic()
    try:
        function()
    except Exception as error:  # noqa: BLE001  the test looks at it
        return time.monotonic() - start, type(error).__name__, str(error)
    return time.monotonic() - start, "", ""
