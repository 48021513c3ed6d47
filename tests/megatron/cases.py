"""What is trained; nothing of Megatron is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXACT = {"exactness": "exact", "chunks": 1}
TWO_CHUNKS = {"chunks": 2}


@dataclass(frozen=True)
class Case:
    """One training: parallel sizes, and settings of Megatron's TransformerConfig."""

    name: str
    ranks: int = 4
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 4
    expert_tensor: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    distributed_optimizer: bool = False
    steps: int = 30
    micro_batches: int = 2

    def __str__(self) -> str:
        return self.name


PAD = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
SHARED = {"moe_shared_expert_intermediate_size": 32}
CASES = (
    Case("EP2", ranks=2, expert=2),
    Case("EP4", distributed_optimizer=True),
    Case("EP1", ranks=2, expert=1, steps=4),
    Case("EP8", ranks=8, expert=8, steps=4),
    Case("TP2 EP4", tensor=2, steps=4),
    Case("TP2 EP2 ETP2", tensor=2, expert=2, expert_tensor=2),
    Case("PP2 EP2", pipeline=2, expert=2),
    Case("PP2 VP2 EP2", pipeline=2, virtual=2, expert=2, steps=4, config={"num_layers": 4}),
    Case("drop and pad", config=PAD),
    Case("drop and pad, ETP2", tensor=2, expert=2, expert_tensor=2, config=PAD, steps=4),
    Case("drop", config={"moe_expert_capacity_factor": 1.0}, steps=4),
    Case("shared expert", config=SHARED, steps=4),
    Case("shared expert, overlap", config={**SHARED, "moe_shared_expert_overlap": True}),
    Case("recompute moe", config={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    Case(
        "recompute full", steps=4,
        config={"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    Case("top 1", steps=4, config={"moe_router_topk": 1, "moe_router_pre_softmax": True}),
    Case("top 8", steps=4, config={"moe_router_topk": 8}),
    Case(
        "groups, aux-free, sigmoid", steps=4,
        config={
            "moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0,
        },
    ),
    Case(
        "probs on input", steps=4,
        config={"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True},
    ),
)  # fmt: skip
