"""An independent dense fp64 MoE: every expert on every token, weighted by the routes. Nothing of planmoe is used."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Gradients:
    """Output and gradients of one rank's part, fp64."""

    output: torch.Tensor  # [T, H]
    tokens: torch.Tensor  # [T, H]
    weights: torch.Tensor  # [K, T]
    experts: list[list[torch.Tensor]]  # per expert, per parameter; over all ranks' tokens


def dense(
    experts: list[nn.Module], tokens: list[torch.Tensor], expert_KT: list[torch.Tensor], weight_KT: list[torch.Tensor]
) -> list[Gradients]:
    """One entry per rank in every list; the loss is the sum over ranks of (output * probe(output.shape)).sum()."""
    doubles = [_double(expert) for expert in experts]
    leaves = [t.detach().double().requires_grad_() for t in tokens]
    weights = [w.detach().double().requires_grad_() for w in weight_KT]
    outputs = []
    for leaf, chosen, weight in zip(leaves, expert_KT, weights, strict=True):
        by_expert = torch.stack([_call(expert, leaf) for expert in doubles])  # [E, T, H]
        output = torch.zeros_like(leaf)
        for route in range(chosen.shape[0]):
            kept = chosen[route] >= 0
            picked = by_expert[chosen[route].clamp(min=0).long(), torch.arange(leaf.shape[0])]
            output = output + torch.where(kept, weight[route], 0.0).unsqueeze(-1) * picked
        outputs.append(output)
    loss = torch.stack([(output * probe(output.shape)).sum() for output in outputs]).sum()
    loss.backward()
    expert_grads = [[_grad(parameter) for parameter in expert.parameters()] for expert in doubles]
    return [
        Gradients(output.detach(), _grad(leaf), _grad(weight), expert_grads)
        for output, leaf, weight in zip(outputs, leaves, weights, strict=True)
    ]


def probe(shape: torch.Size) -> torch.Tensor:
    """Fixed direction that outputs are projected on."""
    return torch.sin(torch.arange(shape.numel(), dtype=torch.float64) * 0.37).reshape(shape)


def _call(expert: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return expert(tokens.reshape(1, 1, *tokens.shape)).reshape(tokens.shape)


def _double(expert: nn.Module) -> nn.Module:
    return copy.deepcopy(expert).double()


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
