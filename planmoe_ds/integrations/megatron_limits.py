"""What of Megatron planmoe does not support: said at the start, all at once, with the way out.

Light on purpose: it only looks at attributes, of Megatron's arguments or of a TransformerConfig; any may be missing.
"""

from __future__ import annotations

from planmoe_ds.errors import PlanMoEConfigError

GRAPHS_WITHOUT_EXPERTS = {"attn", "mlp", "mamba"}
_PADDED = "{} experts need rows padded in another way than planmoe lays them out"
_NO_GRAPH = "planmoe's exchanges wait on the host, which no graph can capture"
_WHOLE = "experts must be whole when planmoe runs them"
_LEAVE_OFF = "leave it off, or use --moe-token-dispatcher alltoall"
_BF16 = "train the experts in bf16 (compression 'fp8' or 'int8' is about the wire), or use alltoall"
_CHUNKS = "leave it off and set planmoe's chunks to 2 or more, or use alltoall"
_ON = {  # what must be off: why, and what to do instead
    "fp8": (_PADDED.format("FP8"), _BF16),
    "fp4": (_PADDED.format("FP4"), _LEAVE_OFF),
    "moe_router_padding_for_fp8": ("it pads routes for FP8 experts", _LEAVE_OFF),
    "moe_router_padding_for_quantization": ("it pads routes for FP8 experts", _LEAVE_OFF),
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph"), (_NO_GRAPH, _LEAVE_OFF)),
    "overlap_moe_expert_parallel_comm": ("it splits layers by micro-batches, planmoe overlaps inside one", _CHUNKS),
    "delay_wgrad_compute": ("planmoe's backward computes weight gradients chunk by chunk", _LEAVE_OFF),
    "overlap_dispatch_backward_with_experts_wgrad": ("planmoe's backward has an order of its own", _LEAVE_OFF),
    **dict.fromkeys(("use_torch_fsdp2", "use_megatron_fsdp"), (_WHOLE, "use the distributed optimizer")),
    "moe_enable_deepep": ("DeepEP is another dispatcher", "choose one of the two"),
}  # fmt: skip


def problems_of(settings: object) -> list[str]:
    """Everything in Megatron's arguments or in a TransformerConfig that planmoe does not support."""

    def problem(name: str, why: str, instead: str) -> str:
        return f"{name} = {getattr(settings, name)!r}: {why}; {instead}"

    found = [problem(name, *words) for name, words in _ON.items() if getattr(settings, name, None)]
    for name, instead in (("recompute_modules", "recompute 'moe'"), ("offload_modules", "leave the experts out")):
        if {"moe_act", "expert_fc1"} & set(getattr(settings, name, None) or ()):
            found.append(problem(name, "planmoe runs experts chunk by chunk, in an order of its own", instead))
    if getattr(settings, "transformer_impl", None) == "inference_optimized":
        instead = "use --transformer-impl transformer_engine or local"
        found.append(problem("transformer_impl", "it has dispatchers of its own", instead))
    if getattr(settings, "moe_token_dispatcher_type", None) not in (None, "alltoall", "planmoe"):
        why = "planmoe takes the place of the all-to-all dispatcher"
        found.append(problem("moe_token_dispatcher_type", why, "set it to 'alltoall'"))
    if getattr(settings, "cuda_graph_impl", None) not in (None, "none"):
        scope = getattr(settings, "cuda_graph_scope", None) or getattr(settings, "cuda_graph_modules", None) or ["full"]
        names = {str(part).rsplit(".", 1)[-1] for part in (scope if isinstance(scope, list) else [scope])}
        if not names <= GRAPHS_WITHOUT_EXPERTS:
            allowed = ", ".join(sorted(GRAPHS_WITHOUT_EXPERTS))
            found.append(
                f"cuda_graph_impl with scope {sorted(names)}: {_NO_GRAPH}; capture only {allowed}, or use alltoall"
            )
    return found


def check_supported(settings: object) -> None:
    """Raise PlanMoEConfigError that names everything of problems_of()."""
    problems = problems_of(settings)
    if problems:
        raise PlanMoEConfigError("planmoe does not work with these settings of Megatron:\n  " + "\n  ".join(problems))
