"""A two-layer mixture-of-experts model small enough to train in a test, and the ways to recompute its blocks.

Shape legend: B sequences, S tokens per sequence, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn
from torch.utils.checkpoint import checkpoint

HIDDEN = 32
NUM_EXPERTS = 8
BALANCE_WEIGHT = 0.05

Recompute = Callable[..., Any]


def two_matrices() -> nn.Module:
    """The usual expert: up, GELU, down."""
    return nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))


def keep(block: nn.Module, *args: Any) -> Any:
    """Keep the block's activations."""
    return block(*args)


def recompute_reentrant(block: nn.Module, *args: Any) -> Any:
    """Recompute the block the old way."""
    return checkpoint(block, *args, use_reentrant=True)


def recompute_non_reentrant(block: nn.Module, *args: Any) -> Any:
    """Recompute the block the way torch recommends."""
    return checkpoint(block, *args, use_reentrant=False)


def recompute_deepspeed(block: nn.Module, *args: Any) -> Any:
    """Recompute the block with DeepSpeed's own function."""
    return deepspeed.checkpointing.checkpoint(block, *args)


def recompute_deepspeed_non_reentrant(block: nn.Module, *args: Any) -> Any:
    """Recompute the block with DeepSpeed's function for inputs without gradient."""
    return deepspeed.checkpointing.non_reentrant_checkpoint(block, *args)


class Block(nn.Module):
    """Layer norm and a mixture of experts, around which the input is carried."""

    def __init__(self, make_moe: Callable[..., nn.Module], make_expert: Callable[[], nn.Module], options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        arguments = {"hidden_size": HIDDEN, "num_experts": NUM_EXPERTS, **options}
        self.moe = make_moe(expert=make_expert(), **arguments)

    def forward(self, hidden: torch.Tensor, used_token: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, S, H] and the used-token mask [B * S] -> the same, and the balance loss."""
        output, balance_loss, _ = self.moe(self.norm(hidden), used_token)
        return hidden + output, balance_loss


class TinyModel(nn.Module):
    """Linear, one block per entry of `layers` (options of MoE), linear."""

    def __init__(
        self,
        layers: Sequence[Mapping[str, Any]],
        make_expert: Callable[[], nn.Module] = two_matrices,
        recompute: Recompute = keep,
        make_moe: Callable[..., nn.Module] = MoE,
    ) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(Block(make_moe, make_expert, options) for options in layers)
        self.last = nn.Linear(HIDDEN, HIDDEN)
        self.recompute = recompute

    def forward(
        self, tokens: torch.Tensor, used_token: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, S, H] -> (loss, output [B, S, H])."""
        hidden = self.first(tokens)
        balance_losses = []
        for block in self.blocks:
            run = self.recompute if self.training else keep
            hidden, balance_loss = run(block, hidden, used_token)
            balance_losses.append(balance_loss)
        output = self.last(hidden)
        loss = (output.float() - tokens.float().roll(1, -1)).pow(2).mean()
        return loss + BALANCE_WEIGHT * torch.stack(balance_losses).sum(), output

    def moe_layers(self) -> list[Any]:
        """The MOELayer of every block."""
        return [block.moe.deepspeed_moe for block in self.blocks]


def tell_experts_apart(model: TinyModel, seed: int = 1000) -> None:
    """Draw the parameters of every expert anew: DeepSpeed makes equal copies, which hide misrouted tokens.

    Ranks that hold the same expert get the same values from DeepSpeed, which broadcasts the first one's.
    """
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    with torch.no_grad():
        for layer in model.moe_layers():
            for parameter in layer.experts.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
