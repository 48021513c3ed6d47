"""Train the tiny model through `deepspeed.initialize` and compare two runs value by value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import nn

import planmoe_ds  # noqa: F401  switches the hook on
from tests.deepspeed.model import HIDDEN, Recompute, TinyModel, keep, tell_experts_apart, two_matrices

SEQUENCES, LENGTH = 4, 8
EXACT = {"exactness": "exact", "chunks": 1}
TWO_CHUNKS = {"chunks": 2}
FLOAT32_TOLERANCE = 1e-6
BFLOAT16_TOLERANCE = 0.06  # found: 0.04, of a bias that starts at zero; 0.002 of losses until a rounding flips a route

Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One training: `layers` are the options of each MoE, `config` goes into the DeepSpeed config."""

    name: str
    layers: Sequence[Mapping[str, Any]] = ({"k": 2, "ep_size": 4},) * 2
    config: Mapping[str, Any] = field(default_factory=dict)
    make_expert: Callable[[], nn.Module] = two_matrices
    recompute: Recompute = keep
    make_moe: Callable[..., nn.Module] = MoE
    make_mpu: Callable[[], Any] | None = None
    prepare: Callable[[TinyModel], None] = tell_experts_apart
    used_token: bool = False
    steps: int = 3
    bitwise: bool = True  # what exactness "exact" with one chunk promises; False: rounding level
    bitwise_on_gpus: bool = True  # not where stock adds up three and more experts: a matrix product, in cuBLAS's order
    sections: Sequence[Mapping[str, Any]] = (EXACT, TWO_CHUNKS)

    def __str__(self) -> str:
        return self.name


def two_layers(**options: Any) -> tuple[dict[str, Any], ...]:
    """The same MoE options twice; four expert-parallel ranks unless told otherwise."""
    return ({"ep_size": 4, **options},) * 2


def make_config(case: Case, planmoe: object) -> dict[str, Any]:
    """The DeepSpeed config of `case`; planmoe None leaves the section out."""
    config = {
        "train_micro_batch_size_per_gpu": SEQUENCES,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}},
        "zero_allow_untested_optimizer": True,
        **case.config,
    }
    return config if planmoe is None else {**config, "planmoe": planmoe}


def make_engine(case: Case, planmoe: object = None, options: Mapping[str, Any] | None = None) -> Any:
    """A DeepSpeedEngine around a model with the same parameters every time.

    `options` are for deepspeed.initialize, instead of the config made of `case` and `planmoe`.
    """
    torch.manual_seed(0)
    model = TinyModel(case.layers, case.make_expert, case.recompute, case.make_moe)
    case.prepare(model)
    groups = split_params_into_different_moe_groups_for_optimizer([{"params": list(model.parameters()), "name": "all"}])
    mpu = None if case.make_mpu is None else case.make_mpu()
    if options is None:
        options = {"config": make_config(case, planmoe)}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, mpu=mpu, **options)
    data_rank = dist.get_rank() if mpu is None else mpu.get_data_parallel_rank()
    torch.manual_seed(7 + data_rank)
    return engine


def batch(engine: Any, used_token: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's next tokens [B, S, H], of the model's dtype, and None or a mask [B * S], empty on rank 1."""
    first = engine.module.first.weight
    tokens = torch.randn(SEQUENCES, LENGTH, HIDDEN).to(first.device, first.dtype)
    if not used_token:
        return tokens, None
    mask = (torch.rand(SEQUENCES * LENGTH) < 0.7).long()
    return tokens, (mask * (dist.get_rank() != 1)).to(tokens.device)


def train_engine(engine: Any, case: Case, steps: int) -> Values:
    """Train and evaluate: losses, router results, evaluation output and final parameters of this rank."""
    values: Values = {}
    for step in range(steps * engine.gradient_accumulation_steps()):
        loss, _ = engine(*batch(engine, case.used_token))
        values[f"step {step}: loss"] = loss.detach().clone()
        for index, layer in enumerate(engine.module.moe_layers()):
            values[f"step {step}: l_aux of layer {index}"] = layer.l_aux.detach().clone()
            values[f"step {step}: exp_counts of layer {index}"] = layer.exp_counts.clone()
        engine.backward(loss)
        engine.step()
    engine.eval()
    with torch.no_grad():
        values["eval: loss"], values["eval: output"] = engine(*batch(engine, case.used_token))
    engine.train()
    for name, parameter in engine.module.named_parameters():
        values[f"parameter {name}"] = parameter.detach().clone()
    return values


def train(case: Case, planmoe: object = None) -> Values:
    """One training from the start; planmoe None is DeepSpeed alone."""
    engine = make_engine(case, planmoe)
    assert hasattr(engine, "planmoe") == bool(planmoe)
    return train_engine(engine, case, case.steps)


def difference(expected: Values, actual: Values, tolerance: float, precise: Values | None = None) -> str:
    """The first value that differs by more than `tolerance` of its tensor's largest; 0 means bit for bit.

    precise: the same training in float32. Twice what `expected` is away from it is allowed as well: both are its
    roundings. Above float32's tolerance, counts and evaluation outputs are not compared: they jump when a route flips.
    """
    if list(expected) != list(actual):
        return f"names differ: {sorted(set(expected) ^ set(actual))}"
    for name, value in expected.items():
        jumps = "exp_counts" in name or name == "eval: output"
        if torch.equal(value, actual[name]) or (jumps and tolerance > FLOAT32_TOLERANCE):
            continue
        if tolerance == 0 or not value.is_floating_point():
            return f"{name} is not equal: {distance(value, actual[name]):.3g} apart"
        allowed = tolerance if precise is None else max(tolerance, 2 * distance(precise[name], value))
        if not distance(value, actual[name]) <= allowed:
            return f"{name} is {distance(value, actual[name]):.3g} apart, allowed is {allowed:g}"
    return ""


def distance(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return float((expected.double() - actual.double()).abs().max() / scale)


def tolerance_of(case: Case, section: Mapping[str, Any], stock: Values) -> float:
    """What `section` may differ by from DeepSpeed's own result."""
    bitwise = case.bitwise and (case.bitwise_on_gpus or dist.get_backend() != "nccl")
    if bitwise and section.get("exactness") == "exact" and section.get("chunks") == 1:
        return 0.0
    return BFLOAT16_TOLERANCE if is_rounded(stock) else FLOAT32_TOLERANCE


def is_rounded(values: Values) -> bool:
    """Whether they are of a training in bfloat16."""
    return any(value.dtype == torch.bfloat16 for value in values.values())


def compare_with_stock(case: Case) -> list[str]:
    """On every rank: what differs from DeepSpeed alone, for each of the case's planmoe sections."""
    stock = train(case)
    problems = []
    precise = train(replace(case, config={**case.config, "bf16": {"enabled": False}})) if is_rounded(stock) else None
    for section in case.sections:
        problem = difference(stock, train(case, section), tolerance_of(case, section, stock), precise)
        if problem:
            problems.append(f"{case.name}, rank {dist.get_rank()}, planmoe {dict(section)}: {problem}")
    return problems
