"""What of Megatron planmoe does not support: said at the start, all at once, with the way out.

Light on purpose: it looks at attributes only, of Megatron's arguments or of a TransformerConfig.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from planmoe_ds.errors import PlanMoEConfigError

GRAPHS_WITHOUT_EXPERTS = {"attn", "mlp", "mamba"}


@dataclass(frozen=True)
class Limit:
    """One setting: for which values it is refused, why, and what to do."""

    name: str
    is_refused: Callable[[Any], bool]
    why: str
    instead: str

    def problem(self, settings: object) -> str | None:
        """A sentence if `settings` has a refused value; a setting that this Megatron lacks is fine."""
        value = getattr(settings, self.name, None)
        if not self.is_refused(value):
            return None
        return f"{self.name} = {value!r}: {self.why}; {self.instead}"


_LEAVE_OFF = "leave it off, or use --moe-token-dispatcher alltoall"
_COMMON = (
    Limit(
        "fp8", bool, "FP8 experts need rows padded in another way than planmoe lays them out",
        "train the experts in bf16 (compression 'fp8' or 'int8' is about the wire), or use alltoall",
    ),
    Limit("fp4", bool, "FP4 experts need rows padded in another way than planmoe lays them out", _LEAVE_OFF),
    Limit("moe_router_padding_for_fp8", bool, "it pads routes for FP8 experts", _LEAVE_OFF),
    Limit("moe_router_padding_for_quantization", bool, "it pads routes for FP8 experts", _LEAVE_OFF),
    Limit("enable_cuda_graph", bool, "planmoe's exchanges wait on the host, which no graph can capture", _LEAVE_OFF),
    Limit("external_cuda_graph", bool, "planmoe's exchanges wait on the host, which no graph can capture", _LEAVE_OFF),
    Limit(
        "overlap_moe_expert_parallel_comm", bool,
        "it splits a layer between micro-batches, while planmoe overlaps inside the layer",
        "leave it off and set planmoe's chunks to 2 or more, or use alltoall",
    ),
    Limit("delay_wgrad_compute", bool, "planmoe's backward computes weight gradients chunk by chunk", _LEAVE_OFF),
    Limit(
        "overlap_dispatch_backward_with_experts_wgrad", bool,
        "planmoe's backward has an order of its own", _LEAVE_OFF,
    ),
    Limit("use_torch_fsdp2", bool, "experts must be whole when planmoe runs them", "use the distributed optimizer"),
    Limit("use_megatron_fsdp", bool, "experts must be whole when planmoe runs them", "use the distributed optimizer"),
    Limit("moe_enable_deepep", bool, "DeepEP is another dispatcher", "choose one of the two"),
    Limit(
        "transformer_impl", lambda value: value == "inference_optimized",
        "it has dispatchers of its own", "use --transformer-impl transformer_engine or local",
    ),
    Limit(
        "moe_token_dispatcher_type", lambda value: value not in (None, "alltoall", "planmoe"),
        "planmoe takes the place of the all-to-all dispatcher", "set it to 'alltoall'",
    ),
)  # fmt: skip


def problems_of(settings: object) -> list[str]:
    """Everything in Megatron's arguments or in a TransformerConfig that planmoe does not support."""
    found = [limit.problem(settings) for limit in _COMMON]
    if getattr(settings, "cuda_graph_impl", None) not in (None, "none"):
        scope = getattr(settings, "cuda_graph_scope", None) or getattr(settings, "cuda_graph_modules", None) or ["full"]
        names = {str(part).rsplit(".", 1)[-1] for part in (scope if isinstance(scope, list) else [scope])}
        if not names <= GRAPHS_WITHOUT_EXPERTS:
            found.append(
                f"cuda_graph_impl with scope {sorted(names)}: planmoe's exchanges wait on the host, which no graph can "
                f"capture; capture only {', '.join(sorted(GRAPHS_WITHOUT_EXPERTS))}, or use alltoall"
            )
    return [problem for problem in found if problem is not None]


def check_supported(settings: object) -> None:
    """Raise PlanMoEConfigError that names everything of problems_of()."""
    problems = problems_of(settings)
    if problems:
        raise PlanMoEConfigError("planmoe does not work with these settings of Megatron:\n  " + "\n  ".join(problems))
