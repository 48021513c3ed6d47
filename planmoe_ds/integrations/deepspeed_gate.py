"""DeepSpeed's router in few operations: in a trace of a small layer the stock one took two fifths of the host's time.

The decision is DeepSpeed's own, from the same random numbers. A router class of one's own stays, and so does
DeepSpeed's where it would decide otherwise than planmoe_ds/router.py does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.comm import pg_utils
from deepspeed.moe import sharded_moe
from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate
from deepspeed.utils import groups
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size

from planmoe_ds.backend import gate_runs_on
from planmoe_ds.router import NO_LIMIT, RouterOptions, decide

_TOLERANCE = 0.01  # of the largest: DeepSpeed picks probabilities by matrix products, which TF32 may round
_SAMPLERS = ("uniform_map", "gumbel_map", "exp_selection_uniform_map")  # DeepSpeed's, made once per process

GateOutput = tuple[Any, ...]  # balance loss, capacity, number of experts, expert, slot and weight [K, T], counts [E]


class PlanMoEGate(TopKGate):  # type: ignore[misc]
    """A TopKGate that decides in few operations; instances are made by choose_gates()."""

    def forward(
        self,
        input: torch.Tensor,  # noqa: A002
        used_token: torch.Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> GateOutput:
        """As TopKGate's: tokens [T, H] -> the router's decision."""
        if not sparse_routes or used_token is not None or use_tutel or not self._can_decide(input):
            stock: GateOutput = super().forward(input, used_token, sparse_routes, use_tutel)
            return stock
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        if self.noisy_gate_policy == "Jitter" and self.training:
            input = sharded_moe.multiplicative_jitter(input.float(), device=input.device)  # noqa: A001
        num_tokens, num_experts = input.shape[0], self.wg.weight.shape[0]
        limit = NO_LIMIT
        if self.drop_tokens:
            factor = self.capacity_factor if self.training else self.eval_capacity_factor
            limit = _capacity(num_tokens, num_experts, factor * self.k, self.min_capacity)
        found = decide(input, self.wg.weight, RouterOptions(self.k, limit, self._samples, self.use_rts))
        capacity = torch.tensor(limit) if self.drop_tokens else self._agreed_capacity(found.counts, num_tokens)
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return found.balance_loss, capacity, num_experts, found.expert, found.slot, found.weight, found.counts

    @property
    def _samples(self) -> bool:
        if self.k == 2:
            return self.top2_2nd_expert_sampling
        return self.k == 1 and self.training and self.noisy_gate_policy == "RSample"

    def _can_decide(self, tokens: torch.Tensor) -> bool:
        """DeepSpeed refuses too few tokens for top-1, and draws random numbers of the default dtype."""
        least = max(1, self.min_capacity) if self.k == 1 else 1
        is_float32 = torch.get_default_dtype() == torch.float32
        return tokens.shape[0] >= least and is_float32 and not torch.is_autocast_enabled(tokens.device.type)

    def _agreed_capacity(self, counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Without dropping: the most rows that any rank has for an expert, as DeepSpeed finds and rounds it."""
        most = counts.max()
        if pg_utils.is_parallel(self.ep_group):
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ep_group)
        if groups._get_expert_model_parallel_world_size() == 1 and groups.mpu is not None:
            parts = bwc_tensor_model_parallel_world_size(mpu=groups.mpu)
            most = (most + parts - 1) // parts * parts
        return most.clamp(max=num_tokens) if self.k == 1 else most


@lru_cache(maxsize=256)
def _capacity(num_tokens: int, num_experts: int, factor: float, least: int) -> int:
    like = torch.empty(num_tokens, num_experts, device="meta")
    with torch.device("cpu"):
        return int(sharded_moe._capacity(like, torch.tensor(factor), torch.tensor(least)))


# ---- which class a router gets ----


def choose_gates(gates: Iterable[TopKGate], device: torch.device, *, exact: bool) -> None:
    """Let DeepSpeed's own routers decide in few operations; exact: with DeepSpeed's operations, to the last bit.

    They are tried before, each kind once, against the DeepSpeed that is installed, or what somebody put in its place.
    """
    tried: dict[tuple[Any, ...], bool] = {}
    for gate in gates:
        if type(gate) not in (TopKGate, PlanMoEGate):
            continue
        gate.__class__ = TopKGate
        if exact or not gate_runs_on(torch.empty(0, device=device)):
            continue
        kind = gate.k, gate.drop_tokens, gate.noisy_gate_policy, gate.use_rts, gate.top2_2nd_expert_sampling
        if kind not in tried:
            try:
                tried[kind] = _decides_alike(device, *kind)
            except Exception:  # noqa: BLE001 - whatever a router of another release makes of the trial
                tried[kind] = False
        if tried[kind]:
            gate.__class__ = PlanMoEGate
    if not all(tried.values()):
        warnings.warn(
            "planmoe: DeepSpeed's router decides otherwise than in the releases that planmoe knows, or refuses its "
            "trial; it stays as it is",
            stacklevel=2,
        )


def _decides_alike(
    device: torch.device, top_k: int, drop_tokens: bool, noisy_gate_policy: str | None, use_rts: bool, samples: bool
) -> bool:
    with _untouched(device):
        gate = TopKGate(
            16, max(8, 2 * top_k), top_k, capacity_factor=0.5, eval_capacity_factor=0.7, min_capacity=1,
            noisy_gate_policy=noisy_gate_policy, drop_tokens=drop_tokens, use_rts=use_rts,
            top2_2nd_expert_sampling=samples,
        )  # fmt: skip
        tokens, probe = torch.randn(48, 16), torch.randn(top_k, 48)
        kinds = TopKGate, PlanMoEGate
        pairs = [[_try(gate.train(training), kind, tokens, probe) for kind in kinds] for training in (True, False)]
    return all(len(stock) == len(ours) and all(map(_is_near, stock, ours)) for stock, ours in pairs)


@contextmanager
def _untouched(device: torch.device) -> Iterator[None]:
    """Inside, a router may be tried on the device: what the caller has switched on is off, and nothing remembers it."""
    dtype, generator = torch.get_default_dtype(), _generator(device)
    state, samplers = generator.get_state(), {name: getattr(sharded_moe, name, {}) for name in _SAMPLERS}
    try:
        torch.set_default_dtype(torch.float32)
        vars(sharded_moe).update({name: {} for name in _SAMPLERS})
        modes = torch.inference_mode(mode=False), torch.enable_grad(), torch.autocast(device.type, enabled=False)
        with torch.device(device), modes[0], modes[1], modes[2]:
            yield
    finally:
        torch.set_default_dtype(dtype)
        vars(sharded_moe).update(samplers)
        generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _try(gate: TopKGate, kind: type[TopKGate], tokens: torch.Tensor, probe: torch.Tensor) -> list[torch.Tensor]:
    """What a gate of this class decides with few places for many routes, the gradient, and the next random number."""
    _generator(tokens.device).manual_seed(1)
    gate.__class__, gate.wg.weight.grad = kind, None
    decision = gate(tokens, None, True, False)
    (decision[0] + (decision[5] * probe).sum()).backward()
    return [torch.as_tensor(one).detach() for one in (*decision, gate.wg.weight.grad, torch.rand(1))]


def _is_near(stock: torch.Tensor, ours: torch.Tensor) -> bool:
    if stock.shape != ours.shape or stock.dtype != ours.dtype or stock.device != ours.device:
        return False
    if not stock.is_floating_point():
        return torch.equal(stock, ours)
    return bool((stock - ours).abs().max() <= _TOLERANCE * stock.abs().max())
