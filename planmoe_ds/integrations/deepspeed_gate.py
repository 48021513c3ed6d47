"""DeepSpeed's router in few operations: for a small layer the host needs longer for the stock one than for all else.

The decision is DeepSpeed's own, from the same random numbers (csrc/kernels/gate.h).
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.comm import pg_utils
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch.autograd.function import once_differentiable
from torch.nn import functional

from planmoe_ds.backend import decide_gate, gate_gradient, gate_runs_on

_NO_LIMIT = -1  # of decide_gate
_TOLERANCE = 0.01  # of the largest: DeepSpeed picks probabilities by matrix products, which TF32 may round

Decision = tuple[Any, ...]  # balance loss, capacity, number of experts, expert, slot and weight [K, T], counts [E]


class _Gate(torch.autograd.Function):
    """Tokens [T, H] and weight [E, H] -> balance loss, expert, slot and weight [K, T], counts [E]."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: torch.Tensor,
        weight: torch.Tensor,
        top_k: int,
        capacity: int,
        samples: bool,
        drops_at_random: bool,
    ) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = tokens.dtype, weight.dtype
        tokens, weight = tokens.float(), weight.float()
        logits = functional.linear(tokens, weight)
        found = decide_gate(logits, top_k=top_k, capacity=capacity, samples=samples, drops_at_random=drops_at_random)
        ctx.save_for_backward(tokens, weight, found.expert, found.weight, found.probs, found.total, found.share)
        ctx.mark_non_differentiable(found.expert, found.slot, found.counts)
        return found.balance_loss, found.expert, found.slot, found.weight, found.counts

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, loss_grad: torch.Tensor, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, weight, expert, weights, probs, total, share = ctx.saved_tensors
        grad = gate_gradient(expert, weights, probs, total, share, weight_grad=grads[2], loss_grad=loss_grad)
        needs_tokens, needs_weight, *_ = ctx.needs_input_grad
        tokens_grad = (grad @ weight).to(ctx.dtypes[0]) if needs_tokens else None
        weight_grad = (grad.t() @ tokens).to(ctx.dtypes[1]) if needs_weight else None
        return tokens_grad, weight_grad, None, None, None, None


class PlanMoEGate(TopKGate):  # type: ignore[misc]
    """A TopKGate that decides in few operations; instances are made by quicken()."""

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002
        used_token: torch.Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> Decision:
        """As TopKGate's: tokens [T, H] -> the router's decision."""
        num_tokens = input.shape[0]
        is_plain = sparse_routes and used_token is None and not use_tutel
        if not is_plain or torch.is_autocast_enabled(input.device.type) or num_tokens < max(1, self.min_capacity):
            stock: Decision = super().forward(input, used_token, sparse_routes, use_tutel)
            return stock
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        if self.noisy_gate_policy == "Jitter" and self.training:
            input = sharded_moe.multiplicative_jitter(input.float(), device=input.device)  # noqa: A001
        num_experts = self.wg.weight.shape[0]
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = _capacity(num_tokens, num_experts, factor * self.k, self.min_capacity) if self.drop_tokens else None
        samples = self.top2_2nd_expert_sampling if self.k == 2 else self._samples_first
        limit = _NO_LIMIT if capacity is None else int(capacity)
        loss, *found = _Gate.apply(  # type: ignore[no-untyped-call]
            input, self.wg.weight, self.k, limit, samples, self.use_rts
        )
        capacity = self._agreed_capacity(found[-1], num_tokens) if capacity is None else capacity
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return loss, capacity, num_experts, *found

    def _agreed_capacity(self, counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Without dropping: the most rows that any rank has for an expert, as DeepSpeed finds and rounds it."""
        most = counts.max()
        if pg_utils.is_parallel(self.ep_group):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ep_group)
        if groups._get_expert_model_parallel_world_size() == 1 and groups.mpu is not None:
            parts = bwc_tensor_model_parallel_world_size(mpu=groups.mpu)
            most = (most + parts - 1) // parts * parts
        return most.clamp(max=num_tokens) if self.k == 1 else most

    @property
    def _samples_first(self) -> bool:
        return self.k == 1 and self.training and self.noisy_gate_policy == "RSample"


@lru_cache(maxsize=256)
def _capacity(num_tokens: int, num_experts: int, factor: float, least: int) -> torch.Tensor:
    like = torch.empty(num_tokens, num_experts, device="meta")
    with torch.device("cpu"):
        return sharded_moe._capacity(like, torch.tensor(factor), torch.tensor(least))


def quicken(gate: TopKGate, device: torch.device) -> None:
    """Let the gate decide in few operations, if it is DeepSpeed's own and that one decides the same."""
    if type(gate) is not TopKGate or not gate_runs_on(torch.empty(0, device=device)):
        return
    options = gate.k, gate.drop_tokens, gate.noisy_gate_policy, gate.use_rts, gate.top2_2nd_expert_sampling
    if _decides_alike(device, *options):
        gate.__class__ = PlanMoEGate


@cache
def _decides_alike(
    device: torch.device,
    top_k: int,
    drop_tokens: bool,
    noisy_gate_policy: str | None,
    use_rts: bool,
    samples_second: bool,
) -> bool:
    """Whether the DeepSpeed that is installed, or what somebody put in its place, decides as decide_gate does."""
    num_tokens, num_experts = 48, max(8, top_k)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad(), torch.device(device):
        torch.manual_seed(0)
        gate = TopKGate(
            16, num_experts, top_k, min_capacity=1, noisy_gate_policy=noisy_gate_policy, drop_tokens=drop_tokens,
            use_rts=use_rts, top2_2nd_expert_sampling=samples_second,
        )  # fmt: skip
        tokens, probe = torch.randn(num_tokens, 16), torch.randn(top_k, num_tokens)
        stock, ours = (_try(gate, kind, tokens, probe) for kind in (TopKGate, PlanMoEGate))
    alike = len(stock) == len(ours) and all(map(_is_near, stock, ours))
    if not alike:
        warnings.warn(
            "planmoe: DeepSpeed's router decides otherwise than in the releases that planmoe knows; it stays as it is",
            stacklevel=2,
        )
    return alike


def _try(gate: TopKGate, kind: type[TopKGate], tokens: torch.Tensor, probe: torch.Tensor) -> list[torch.Tensor]:
    """What a gate of this class decides with few places for so many routes, and the gradient."""
    torch.manual_seed(1)
    gate.__class__, gate.wg.weight.grad = kind, None
    decision = gate(tokens, None, True, False)
    (decision[0] + (decision[5] * probe).sum()).backward()
    return [torch.as_tensor(one).detach() for one in (*decision, gate.wg.weight.grad)]


def _is_near(stock: torch.Tensor, ours: torch.Tensor) -> bool:
    if stock.shape != ours.shape or stock.dtype != ours.dtype:
        return False
    if not stock.is_floating_point():
        return torch.equal(stock, ours)
    return bool((stock - ours).abs().max() <= _TOLERANCE * stock.abs().max())
