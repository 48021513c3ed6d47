"""What stock DeepSpeed and stock Megatron do in the main faults: python -m tests.faults.stock [--seconds 60].

Every fault runs on four ranks over gloo, in processes of their own; the table says for each what the ranks ended with
and after how many seconds. A rank that has not ended after --seconds counts as hanging. docs/reliability.md has a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.faults.layers import die, in_backward
from tests.harness.ranks import RankPool

ODD, STEP, STEPS = 2, 1, 3
RANKS = 4
FAULTS = ("killed", "skipped layer", "other capacity", "evaluates alone")
Found = tuple[str, float]  # the error, or what came of it, and seconds since the fault
Layers = list[Callable[[torch.Tensor], torch.Tensor]]


def run_steps(layers: Layers, fault: str, spoil_capacity: Callable[[], None]) -> Found:
    """Steps through two layers; rank ODD does something else in step STEP."""
    odd = dist.get_rank() == ODD
    start = time.monotonic()
    finite = True
    try:
        for step in range(STEPS):
            bad = odd and step == STEP
            if step == STEP:
                dist.barrier()
                start = time.monotonic()
            if bad and fault == "other capacity":
                spoil_capacity()
            hidden = torch.randn(8, 4, 16, requires_grad=True)
            with torch.set_grad_enabled(not (bad and fault == "evaluates alone")):
                output = hidden if bad and fault == "skipped layer" else layers[0](hidden)
                if bad and fault == "killed":
                    output = in_backward(output, die)
                output = layers[1](output)
            if output.requires_grad:
                output.sum().backward()
            finite = finite and bool(output.isfinite().all())
    except Exception as error:  # noqa: BLE001  it is what is looked for
        return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}", time.monotonic() - start
    return "no error" + ("" if finite else ", not finite"), time.monotonic() - start


def deepspeed_layers(settings: dict[str, Any] | None) -> tuple[Layers, Callable[[], None]]:
    """DeepSpeed's layers, planmoe on with settings, and what gives a rank another capacity from then on."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    expert = torch.nn.Linear(16, 16)
    modules = torch.nn.ModuleList(MoE(16, expert, num_experts=8, ep_size=RANKS, k=2) for _ in range(2))
    for module in modules:
        module.set_deepspeed_parallelism()
    if settings is not None:
        import planmoe_ds

        planmoe_ds.activate(modules, settings)

    def spoil() -> None:
        for module in modules:
            module.deepspeed_moe.gate.capacity_factor = 2.0

    return [lambda rows, module=module: module(rows)[0] for module in modules], spoil  # type: ignore[misc]


def megatron_layers(settings: dict[str, Any] | None) -> tuple[Layers, Callable[[], None]]:
    """The same with megatron.core's."""
    from tests.megatron.cases import Case
    from tests.megatron.training import make_chunks, make_config, start

    capacity = {"moe_expert_capacity_factor": 1.25, "moe_pad_expert_input_to_capacity": True}
    case = Case("faults", expert=RANKS, config={**capacity, "moe_router_load_balancing_type": "none"})
    start(case)
    model = make_chunks(case, make_config(case))[0]
    if settings is not None:
        from planmoe_ds.integrations.megatron import activate

        activate(model, settings)
    modules = [layer.mlp for layer in model.module.decoder.layers]

    def spoil() -> None:
        for module in modules:
            config = dataclasses.replace(module.config, moe_expert_capacity_factor=2.0)
            module.token_dispatcher.config = module.router.config = config
            module.token_dispatcher.moe_expert_capacity_factor = 2.0

    return [lambda rows, module=module: module(rows)[0] for module in modules], spoil  # type: ignore[misc]


FRAMEWORKS = {"DeepSpeed": deepspeed_layers, "Megatron": megatron_layers}
PLANMOE = {"chunks": 2, "timeout_seconds": 30}


def on_rank(framework: str, fault: str, planmoe: bool) -> Found:
    """One rank's part."""
    layers, spoil_capacity = FRAMEWORKS[framework](PLANMOE if planmoe else None)
    return run_steps(layers, fault, spoil_capacity)


def watch(framework: str, fault: str, planmoe: bool, seconds: float) -> list[str]:
    """What became of every rank."""
    from tests.faults.stock import on_rank as function  # by its name, which this script's own is not

    pool = RankPool(preload=False)
    try:
        outcomes = pool.run(
            RANKS, function, framework, fault, planmoe, expect_failure=True, fresh=True, timeout=seconds
        )
    except AssertionError as error:
        stuck = getattr(error, "stuck", ())
        return [f"ranks {list(stuck)} hang after {seconds:g} s"]
    finally:
        pool.close()
    lines = []
    for outcome in outcomes:
        what, took = outcome.result if not outcome.failed else (f"{outcome.error}: {outcome.message}", outcome.seconds)
        lines.append(f"rank {outcome.rank}: {took:.1f} s: {what}")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="after which a rank counts as hanging (60)")
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=list(FRAMEWORKS))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    arguments = parser.parse_args()
    for framework in arguments.frameworks:
        for fault in arguments.faults:
            for planmoe in (False, True):
                print(f"\n{framework}{' with planmoe' if planmoe else ''}, {fault}:", flush=True)
                print("\n".join(watch(framework, fault, planmoe, arguments.seconds)), flush=True)


if __name__ == "__main__":
    main()
