"""Lets megatron.core 0.15 and 0.16 train on CPU ranks over gloo, where it takes a GPU for granted.

Call prepare() before the first import of megatron. It replaces names of torch and megatron for the whole process: for
trying things out and for tests, never where there is a GPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_without_engine import do_without_transformer_engine

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")


class CpuStream:
    """A stream where everything runs at once: nothing to wait for."""

    cuda_stream = 0
    priority = 0
    device = CPU

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuStream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, stream: CpuStream) -> None:
        """Nothing is pending."""

    def wait_event(self, event: CpuEvent) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event of now."""
        event = CpuEvent() if event is None else event
        event.record()
        return event


class CpuEvent:
    """A point in time."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.seconds = 0.0

    def record(self, _: CpuStream | None = None) -> None:
        """Remember now."""
        self.seconds = time.perf_counter()

    def wait(self, stream: CpuStream | None = None) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, later: CpuEvent) -> float:
        """Milliseconds between two."""
        return (later.seconds - self.seconds) * 1e3


def prepare() -> None:
    """Replace what megatron.core expects of CUDA; calling it again changes nothing."""
    if hasattr(torch.cuda, "planmoe_on_cpu"):
        return
    torch.cuda.planmoe_on_cpu = True  # type: ignore[attr-defined]
    _replace_cuda()
    _replace_factories()
    _replace_uneven_collectives()
    _replace_megatron()


def _replace_cuda() -> None:
    @contextmanager
    def stream(*_: Any) -> Iterator[None]:
        yield

    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.Stream, cuda.Event, cuda.stream = CpuStream, CpuEvent, stream
    cuda.current_stream = cuda.default_stream = lambda *_: CpuStream()
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda *_: None
    tensor.cuda = lambda self, *_, **__: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_: self
    tensor.type = _named_as_on_cuda(torch.Tensor.type)


def _named_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers sort parameters by names like torch.cuda.FloatTensor."""

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        is_name = isinstance(found, str) and not found.startswith("torch.cuda.")  # a default device calls this twice
        return found.replace("torch.", "torch.cuda.", 1) if is_name else found

    return type_


def _replace_factories() -> None:
    def on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def make(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = CPU
            return original(*args, **kwargs)

        return make

    for name in FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _replace_uneven_collectives() -> None:
    """Gloo gathers and scatters equal parts only; tensor-parallel experts have unequal ones."""
    even_gather = dist.all_gather

    def all_gather(parts: Sequence[torch.Tensor], own: torch.Tensor, group: Any = None, **options: Any) -> Any:
        most = max(part.shape[0] for part in parts)
        if all(part.shape[0] == most for part in parts):
            return even_gather(list(parts), own.contiguous(), group=group, **options)
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: own.shape[0]] = own
        gathered = [torch.empty_like(padded) for _ in parts]
        even_gather(gathered, padded, group=group)
        for part, rows in zip(parts, gathered, strict=True):
            part.copy_(rows[: part.shape[0]])
        return None

    def reduce_scatter(own: torch.Tensor, parts: Sequence[torch.Tensor], group: Any = None, **_: Any) -> None:
        total = torch.cat([part.contiguous() for part in parts])
        dist.all_reduce(total, group=group)
        own.copy_(total.split([part.shape[0] for part in parts])[dist.get_rank(group)])

    dist.all_gather = all_gather  # type: ignore[assignment]
    dist.reduce_scatter = reduce_scatter  # type: ignore[assignment]


def _replace_megatron() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_host_value
    do_without_transformer_engine()


def _as_host_value(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
    """On a GPU, splits arrive as numpy arrays; on the CPU Megatron would leave them as tensors."""
    return tensor.detach().numpy() if torch.is_tensor(tensor) and as_numpy else tensor
