"""Lets one training drop what another dropped: at the capacity limit two probabilities may differ by rounding alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer.moe import router

TIE = 1e-5  # probabilities no further apart count as equal

Choose = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def record_drops(kept: list[torch.Tensor]) -> Iterator[None]:
    """Append the map of kept routes of every call of every router."""

    def note(probabilities: torch.Tensor, kept_now: torch.Tensor) -> torch.Tensor:
        kept.append(kept_now)
        return kept_now

    with _choosing(note):
        yield


@contextmanager
def replay_drops(kept: list[torch.Tensor]) -> Iterator[None]:
    """Keep what was kept then; raise AssertionError where another choice cannot be put down to a tie."""
    calls = iter(kept)

    def repeat(probabilities: torch.Tensor, kept_now: torch.Tensor) -> torch.Tensor:
        then = next(calls)
        for expert in (then != kept_now).any(0).nonzero().flatten():
            swapped = probabilities[:, expert][then[:, expert] != kept_now[:, expert]]
            assert swapped.max() - swapped.min() <= TIE, f"other routes are dropped: {swapped.tolist()}"
        return then

    with _choosing(repeat):
        yield
    assert next(calls, None) is None, "fewer calls of the routers"


@contextmanager
def _choosing(choose: Choose) -> Iterator[None]:
    """While open, `choose(probabilities, map of what Megatron keeps)` says what the routers keep."""
    drop = router.apply_router_token_dropping

    def drop_as_chosen(probabilities: torch.Tensor, *args: Any, **options: Any) -> Any:
        kept = choose(probabilities.detach(), drop(probabilities, *args, **options)[1])
        return probabilities * kept, kept

    router.apply_router_token_dropping = drop_as_chosen
    try:
        yield
    finally:
        router.apply_router_token_dropping = drop
