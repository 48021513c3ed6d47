"""Experts that users bring: each a module mapping rows [..., H] to rows [..., H]."""

from __future__ import annotations

import deepspeed
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.deepspeed.model import HIDDEN, TinyModel, tell_experts_apart, two_matrices


class TupleExpert(nn.Module):
    """Returns its bias apart, as Megatron's layers do; DeepSpeed drops it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = two_matrices()
        self.bias = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, bias)."""
        return self.body(rows), self.bias


class SwiGLU(nn.Module):
    """Three matrices, no bias, gate and value from one input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.value = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Down(silu(gate) * value)."""
        down: torch.Tensor = self.down(nn.functional.silu(self.gate(rows)) * self.value(rows))
        return down


class BufferExpert(nn.Module):
    """Scales by a buffer and counts its calls in another."""

    def __init__(self) -> None:
        super().__init__()
        self.body = two_matrices()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, HIDDEN))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Scaled rows."""
        self.calls += 1
        scaled: torch.Tensor = self.body(rows * self.scale.to(rows.dtype))
        return scaled


class DropoutExpert(nn.Module):
    """Draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(two_matrices(), nn.Dropout(0.3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows, some values zero."""
        dropped: torch.Tensor = self.body(rows)
        return dropped


class PartlyUnusedExpert(nn.Module):
    """Has a parameter that takes no part in the result."""

    def __init__(self) -> None:
        super().__init__()
        self.body = two_matrices()
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows through the body."""
        output: torch.Tensor = self.body(rows)
        return output


class _RecomputingExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = two_matrices()


class ReentrantExpert(_RecomputingExpert):
    """Recomputes itself the old way."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows through the body."""
        output: torch.Tensor = checkpoint(self.body, rows, use_reentrant=True)
        return output


class NonReentrantExpert(_RecomputingExpert):
    """Recomputes itself the way torch recommends."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows through the body."""
        output: torch.Tensor = checkpoint(self.body, rows, use_reentrant=False)
        return output


class DeepSpeedRecomputingExpert(_RecomputingExpert):
    """Recomputes itself with DeepSpeed's function."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows through the body."""
        output: torch.Tensor = deepspeed.checkpointing.checkpoint(self.body, rows)
        return output


class AutocastExpert(_RecomputingExpert):
    """Computes in bfloat16 whatever the model's dtype and returns that."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows in bfloat16."""
        with torch.autocast("cpu", torch.bfloat16):
            output: torch.Tensor = self.body(rows)
        return output


def share_first_matrix(model: TinyModel) -> None:
    """Let the experts of a rank share their first matrix, within a layer."""
    tell_experts_apart(model)
    for layer in model.moe_layers():
        first, *others = layer.experts.deepspeed_experts
        for expert in others:
            expert[0].weight = first[0].weight


def freeze_experts(model: TinyModel) -> None:
    """No expert learns."""
    tell_experts_apart(model)
    for layer in model.moe_layers():
        layer.experts.requires_grad_(False)


def freeze_first_matrix(model: TinyModel) -> None:
    """Only the second matrix of every expert learns."""
    tell_experts_apart(model)
    for layer in model.moe_layers():
        for expert in layer.experts.deepspeed_experts:
            expert[0].requires_grad_(False)


def freeze_before_experts(model: TinyModel) -> None:
    """The first layer gets tokens without gradient."""
    tell_experts_apart(model)
    model.first.requires_grad_(False)
    model.blocks[0].norm.requires_grad_(False)
