"""Two tensor-parallel ranks times two data-parallel ranks, and an expert whose matrices are split between the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import nn

from tests.deepspeed.model import HIDDEN

TENSOR_PARALLEL_SIZE = 2


class TwoByTwo:
    """The parallelism object that Megatron hands to DeepSpeed: ranks 0-1 and 2-3 are tensor parallel."""

    def __init__(self) -> None:
        rank, size = dist.get_rank(), TENSOR_PARALLEL_SIZE
        ranks = range(dist.get_world_size())
        tensor = [dist.new_group(list(ranks[first : first + size])) for first in ranks[::size]]
        data = [dist.new_group(list(ranks[first::size])) for first in range(size)]
        self._tensor, self._data = tensor[rank // size], data[rank % size]

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same tokens."""
        return self._tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """Place among them."""
        return dist.get_rank(self._tensor)

    def get_tensor_model_parallel_world_size(self) -> int:
        """Their number."""
        return TENSOR_PARALLEL_SIZE

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same part of the model."""
        return self._data

    def get_data_parallel_rank(self) -> int:
        """Place among them."""
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        """Their number."""
        return dist.get_world_size(self._data)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size


class _Copy(torch.autograd.Function):
    """Every rank's own use of a replicated tensor: the gradients of all of them are added."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _sum(grad)


class _Reduce(torch.autograd.Function):
    """The sum of every rank's part, replicated."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _sum(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.clone()
    dist.all_reduce(total, group=groups.mpu.get_tensor_model_parallel_group())
    return total


class SplitExpert(nn.Module):
    """This rank's columns of the first matrix and rows of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN // TENSOR_PARALLEL_SIZE)
        self.down = nn.Linear(2 * HIDDEN // TENSOR_PARALLEL_SIZE, HIDDEN, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., H] -> rows [..., H], the same on both ranks."""
        partial = self.down(torch.nn.functional.gelu(self.up(_Copy.apply(rows))))
        summed: torch.Tensor = _Reduce.apply(partial)
        return summed


@contextmanager
def gather_works_on_gloo() -> Iterator[None]:
    """Let DeepSpeed's gather_tokens pass a flat tensor: gloo refuses its [E, C, H] together with its flat result."""
    original = deepspeed.comm.all_gather_into_tensor

    def gather(result: torch.Tensor, part: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        return original(result, part.reshape(-1), *arguments, **options)

    with mock.patch.object(deepspeed.comm, "all_gather_into_tensor", gather):
        yield
