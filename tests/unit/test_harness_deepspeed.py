"""DeepSpeed trains on the pool as in new processes, whatever groups earlier calls made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from tests.conftest import make_pool
from tests.harness.ranks import RankPool

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

_HIDDEN, _NUM_EXPERTS, _TOKENS, _STEPS = 8, 4, 4, 3


class TinyMoE(torch.nn.Module):
    """A linear layer and a mixture of four experts; forward maps [tokens, hidden] to a scalar loss."""

    def __init__(self, expert_parallel_size: int) -> None:
        super().__init__()
        expert = torch.nn.Sequential(
            torch.nn.Linear(_HIDDEN, 2 * _HIDDEN), torch.nn.GELU(), torch.nn.Linear(2 * _HIDDEN, _HIDDEN)
        )
        self.linear = torch.nn.Linear(_HIDDEN, _HIDDEN)
        self.moe = MoE(_HIDDEN, expert, num_experts=_NUM_EXPERTS, ep_size=expert_parallel_size, k=2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of the output from one."""
        output, _, _ = self.moe(self.linear(tokens))
        return (output.float() - 1).pow(2).mean()


class DataParallelOnly:
    """The parallelism object Megatron hands to DeepSpeed, without model parallelism."""

    def __init__(self) -> None:
        everyone = list(range(dist.get_world_size()))
        self._data = dist.new_group(everyone)
        self._model = [dist.new_group([rank]) for rank in everyone][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        """Rank among the ranks sharing one copy of the model."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks sharing one copy of the model."""
        return 1

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks sharing one copy of the model."""
        return self._model

    def get_data_parallel_rank(self) -> int:
        """Rank among the copies of the model."""
        return dist.get_rank()

    def get_data_parallel_world_size(self) -> int:
        """Number of copies of the model."""
        return dist.get_world_size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """One rank of every copy of the model."""
        return self._data

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group


def train(expert_parallel_size: int, zero_stage: int, use_mpu: bool) -> list[float]:
    """Three steps of training through `deepspeed.initialize`; returns the losses of this rank."""
    model = TinyMoE(expert_parallel_size)
    parameters = split_params_into_different_moe_groups_for_optimizer(
        [{"params": list(model.parameters()), "name": "all"}]
    )
    config = {
        "train_micro_batch_size_per_gpu": _TOKENS,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero_stage},
        "bf16": {"enabled": zero_stage > 0},
    }
    mpu = DataParallelOnly() if use_mpu else None
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, mpu=mpu, config=config)
    torch.manual_seed(7 + dist.get_rank())
    losses = []
    for _ in range(_STEPS):
        loss = engine(torch.randn(_TOKENS, _HIDDEN, dtype=next(model.parameters()).dtype))
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def count_threads() -> int:
    """Threads of this process, Python's and others."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture(scope="module")
def ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """Processes of this file's own: of the session's some may have imported planmoe, and those wait for the others."""
    pool = make_pool(pytestconfig)
    yield pool
    pool.close()


def test_trains_as_in_new_processes(ranks: RankPool) -> None:
    order = [(4, 1, 0, False), (4, 2, 1, False), (2, 2, 0, True), (4, 4, 2, True), (1, 1, 0, False)]
    reused = [ranks.run(world_size, train, *rest) for world_size, *rest in order]
    last = ranks.run(4, train, 4, 0, use_mpu=False)
    assert last == ranks.run(4, train, 4, 0, use_mpu=False, bare=True)
    assert reused[2] == ranks.run(2, train, 2, 0, use_mpu=True, bare=True)
    assert all(losses[-1] < losses[0] for result in reused for losses in result)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_leaves_no_threads_behind(ranks: RankPool, zero_stage: int) -> None:
    ranks.run(2, train, 2, zero_stage, use_mpu=False)
    before = ranks.run(2, count_threads)
    for _ in range(2):
        ranks.run(2, train, 2, zero_stage, use_mpu=False)
    assert ranks.run(2, count_threads) == before
