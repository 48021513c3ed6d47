"""A router of DeepSpeed's kind in few operations, forward and backward; what it decides is in csrc/kernels/gate.h.

Shape legend: T tokens, K routes per token, H hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from planmoe_ds.backend import decide_gate, gate_gradient

NO_LIMIT = -1


@dataclass(frozen=True)
class RouterOptions:
    """See GateOptions in csrc/kernels/gate.h; capacity: NO_LIMIT where nothing is dropped."""

    top_k: int
    capacity: int
    samples: bool
    drops_at_random: bool


@dataclass(frozen=True)
class Decision:
    """balance_loss: float32, one number; expert and slot: int32 [K, T]; weight: float32 [K, T]; counts: int64 [E]."""

    balance_loss: torch.Tensor
    expert: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor
    counts: torch.Tensor


def decide(tokens: torch.Tensor, weight: torch.Tensor, options: RouterOptions) -> Decision:
    """Tokens [T, H] and the router's weight [E, H] -> its decision, differentiable once; logits are in float32."""
    return Decision(*_Router.apply(tokens, weight, options))  # type: ignore[no-untyped-call]


class _Router(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, weight: torch.Tensor, options: RouterOptions
    ) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = tokens.dtype, weight.dtype
        tokens, weight = tokens.float(), weight.float()
        found = decide_gate(functional.linear(tokens, weight), **vars(options))
        weight = weight.detach()  # the numbers of now, whatever the parameter holds later
        ctx.save_for_backward(tokens, weight, found.expert, found.probs, found.total, found.share)
        ctx.mark_non_differentiable(found.expert, found.slot, found.counts)
        ctx.set_materialize_grads(False)
        return found.balance_loss, found.expert, found.slot, found.weight, found.counts

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: Any, loss_grad: torch.Tensor | None, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        tokens, weight, expert, probs, total, share = ctx.saved_tensors
        logits_grad = gate_gradient(expert, probs, total, share, weight_grad=grads[2], loss_grad=loss_grad)
        needs_tokens, needs_weight, _ = ctx.needs_input_grad
        tokens_grad = (logits_grad @ weight).to(ctx.dtypes[0]) if needs_tokens else None
        weight_grad = (logits_grad.t() @ tokens).to(ctx.dtypes[1]) if needs_weight else None
        return tokens_grad, weight_grad, None
