"""Pipeline parallelism: two stages with one MoE layer each, two ranks per stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

from planmoe_ds.errors import PlanMoEConfigError
from tests.deepspeed.model import HIDDEN, NUM_EXPERTS, two_matrices
from tests.deepspeed.training import EXACT, FLOAT32_TOLERANCE, Values, difference
from tests.harness.ranks import RankPool

pytestmark = pytest.mark.distributed

STAGES, STEPS, MICRO_BATCH, ACCUMULATION = 2, 3, 8, 4


class MoEStage(nn.Module):
    """A mixture of experts around which the input is carried; tensor in, tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.moe = MoE(HIDDEN, two_matrices(), NUM_EXPERTS, ep_size=2, k=2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, H] -> [tokens, H]."""
        output, _, _ = self.moe(self.norm(hidden))
        total: torch.Tensor = hidden + output
        return total


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error."""
    return (output - target).square().mean()


def start_pipeline(section: Any, layers: list[LayerSpec]) -> Any:
    """The engine of two stages, half of the layers each."""
    deepspeed.init_distributed()
    torch.manual_seed(0)
    module = PipelineModule(layers, num_stages=STAGES, loss_fn=squared_error, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        **({} if section is None else {"planmoe": section}),
    }
    groups = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(module.parameters()), "name": "all"}]
    )
    engine, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=config)
    return engine


def train_pipeline(section: Any) -> Values:
    """Losses and final parameters of this rank's stage."""
    linear = LayerSpec(nn.Linear, HIDDEN, HIDDEN)
    engine = start_pipeline(section, [linear, LayerSpec(MoEStage), LayerSpec(MoEStage), linear])
    torch.manual_seed(7 + dist.get_rank())
    batches = [(torch.randn(MICRO_BATCH, HIDDEN), torch.randn(MICRO_BATCH, HIDDEN)) for _ in range(ACCUMULATION)]
    values: Values = {}
    for step in range(STEPS):
        values[f"step {step}: loss"] = engine.train_batch(iter(batches)).clone()
    assert hasattr(engine, "planmoe") == (section is not None)
    return values | {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def resume_pipeline(folder: str) -> tuple[list[int], str]:
    """The experts' sizes in the file, and the error of a resume, where the stages have one and two MoE layers."""
    engine = start_pipeline({"chunks": 1}, [LayerSpec(nn.Linear, HIDDEN, HIDDEN), *[LayerSpec(MoEStage)] * 3])
    engine.save_checkpoint(folder, tag="all")
    dist.barrier()
    written = json.loads((Path(folder) / "all" / "planmoe.json").read_text())["expert_parallel_sizes"]
    try:
        engine.load_checkpoint(folder, tag="all")
    except PlanMoEConfigError as error:
        return written, str(error)
    return written, ""


def test_stages_of_different_depth_resume(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(4, resume_pipeline, str(tmp_path), timeout=120) == [([2, 2, 2], "")] * 4


def compare_pipelines() -> list[str]:
    """How one chunk, exact, and three chunks differ from DeepSpeed alone."""
    stock = train_pipeline(None)
    exact, chunked = train_pipeline(EXACT), train_pipeline({"chunks": 3})
    return [difference(stock, exact, 0.0), difference(stock, chunked, FLOAT32_TOLERANCE)]


def test_two_stages(ranks: RankPool) -> None:
    assert ranks.run(4, compare_pipelines, timeout=120) == [["", ""]] * 4
