"""Steps through two layers in which rank ODD does something else, or a number goes wrong."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tests.faults.layers import die, in_backward
from tests.faults.stock.layers import FRAMEWORKS, HIDDEN, TOP_K, Layers

ODD, STEP, STEPS = 2, 1, 3
LONG = 10_000.0  # seconds: longer than anybody watches
PLANMOE = {"chunks": 2, "timeout_seconds": 10}

Tokens = Callable[[torch.Tensor], torch.Tensor]


def unchanged(tokens: torch.Tensor) -> torch.Tensor:
    """What ranks other than the odd one do."""
    return tokens


def leave_alone(_: Layers) -> None:
    """The same, for layers."""


@dataclass(frozen=True)
class Fault:
    """What the odd rank does in step STEP where the others do the usual."""

    prepare: Callable[[Layers], None] = leave_alone
    tokens: Tokens = unchanged
    between: Tokens = unchanged  # the two layers
    order: tuple[int, ...] = (0, 1)
    gradients: bool = True
    before_backward: Callable[[Layers], None] = leave_alone
    build: Mapping[str, int] = field(default_factory=dict)  # options of its layers
    capacity: bool = False  # of Megatron's layers, on every rank
    on_all_ranks: bool = False  # do it everywhere


def then(action: Callable[[], Any]) -> Tokens:
    """Do something between the layers."""

    def act(tokens: torch.Tensor) -> torch.Tensor:
        action()
        return tokens

    return act


def run_out_of_memory() -> None:
    """As torch does."""
    raise torch.OutOfMemoryError("no memory left for this test")


def end_program() -> None:
    """What the interpreter does after the last line."""
    atexit._run_exitfuncs()
    os._exit(0)


def die_in_exchange(_: Layers) -> None:
    """As soon as the next exchange is posted."""
    from planmoe_ds.backend import Comm

    for owner, name in ((dist.ProcessGroup, "all_to_all_single"), (Comm, "dispatch")):
        usual = getattr(owner, name)

        def post_and_die(*arguments: Any, usual: Any = usual) -> None:
            usual(*arguments)
            die()

        patch.object(owner, name, post_and_die).start()


def one_bad(value: float) -> Tokens:
    """One entry of one token."""

    def spoil(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.clone()
        tokens[3, 2, 5] = value
        return tokens

    return spoil


def evaluate(layers: Layers) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        layers.functions[1](layers.functions[0](torch.ones(8, 4, HIDDEN)))


FAULTS = {
    "nothing": Fault(),
    "nothing, with a capacity": Fault(capacity=True),
    "killed in the forward pass": Fault(between=then(die)),
    "killed in an expert": Fault(prepare=lambda layers: layers.each_expert(1, die)),
    "killed in an exchange": Fault(prepare=die_in_exchange),
    "killed in the backward pass": Fault(between=lambda tokens: in_backward(tokens, die)),
    "hangs": Fault(between=then(lambda: time.sleep(LONG))),
    "freezes": Fault(between=then(lambda: os.kill(os.getpid(), signal.SIGSTOP))),
    "ends its program": Fault(between=then(end_program)),
    "out of memory in an expert": Fault(prepare=lambda layers: layers.each_expert(1, run_out_of_memory)),
    "skips a layer": Fault(order=(1,)),
    "layers in another order": Fault(order=(1, 0)),
    "calls a layer once more": Fault(order=(0, 0, 1)),
    "evaluates alone": Fault(gradients=False),
    "evaluates before its backward pass": Fault(before_backward=evaluate),
    "another capacity": Fault(prepare=lambda layers: layers.double_capacity(), capacity=True),
    "another dtype": Fault(tokens=lambda tokens: tokens.bfloat16()),
    "another hidden size": Fault(build={"hidden": 2 * HIDDEN}),
    "another top-k": Fault(build={"top_k": 3}),
    "ten times slower": Fault(between=then(lambda: time.sleep(3))),
    "no tokens": Fault(tokens=lambda tokens: tokens[:0]),
    "all tokens to one expert": Fault(prepare=lambda layers: layers.favour(), tokens=torch.abs, on_all_ranks=True),
    "NaN in a token": Fault(tokens=one_bad(float("nan"))),
    "infinity in a token": Fault(tokens=one_bad(float("inf"))),
}


@dataclass(frozen=True)
class Found:
    """What a rank ended with, seconds since the fault; its results, and how many rows of them are not finite."""

    what: str
    seconds: float
    sums: tuple[float, ...] = ()
    spoiled_rows: int = 0


def first_line(error: Exception) -> str:
    """The class and the beginning of the message."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def one_step(layers: Layers, fault: Fault, step: int, hidden: int) -> tuple[float, int]:
    """Sum of output and gradient, and rows that are not finite."""
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    tokens = fault.tokens(torch.randn(8, 4, hidden, generator=generator)).requires_grad_()
    fault.prepare(layers)
    with torch.set_grad_enabled(fault.gradients):
        output = tokens
        for place, index in enumerate(fault.order):
            output = layers.functions[index](output)
            if place == 0:
                output = fault.between(output)
    fault.before_backward(layers)
    results = [output.detach()]
    if output.requires_grad:
        output.float().square().sum().backward()
        assert tokens.grad is not None
        results.append(tokens.grad)
    rows = torch.stack([result.flatten(0, 1).float() for result in results])
    spoiled = (~rows.isfinite()).any(-1).any(0)
    return float(rows.nan_to_num(0, 0, 0).abs().sum()), int(spoiled.sum())


def on_rank(framework: str, name: str, planmoe: bool) -> Found:
    """One rank's part of a fault."""
    fault = FAULTS[name]
    is_odd = fault.on_all_ranks or dist.get_rank() == ODD
    build: dict[str, int] = {"hidden": HIDDEN, "top_k": TOP_K, **(fault.build if is_odd else {})}
    sums, spoiled = [], 0
    start = time.monotonic()
    try:
        layers = FRAMEWORKS[framework](PLANMOE if planmoe else None, capacity=fault.capacity, **build)
        for step in range(STEPS):
            if step == STEP:
                dist.barrier()
                start = time.monotonic()
            result, rows = one_step(layers, fault if is_odd and step == STEP else Fault(), step, build["hidden"])
            sums.append(result)
            spoiled += rows if step == STEP else 0
    except Exception as error:  # noqa: BLE001  it is what is looked for
        return Found(first_line(error), time.monotonic() - start)
    return Found("no error", time.monotonic() - start, tuple(sums), spoiled)
