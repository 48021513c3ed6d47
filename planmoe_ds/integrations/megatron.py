"""Megatron: activate() sends every MoELayer of a megatron.core model through planmoe.

The classes of a layer and of its all-to-all dispatcher become subclasses that hand the layer's tokens, the router's
decision and the experts to the engine. Parameters, checkpoints, isinstance checks, router, shared experts and the
config, whose moe_token_dispatcher_type stays "alltoall", are Megatron's. With megatron.training, megatron_patches
calls activate(); models built from megatron.core alone call it themselves.

Shape legend: T tokens of this rank, E experts, K routes per token, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from planmoe_ds.agreement import check_agreement
from planmoe_ds.config import Exactness, PlanMoEConfig, parse_config
from planmoe_ds.equal_experts import between
from planmoe_ds.errors import PlanMoEConfigError, PlanMoEError
from planmoe_ds.experts import Experts
from planmoe_ds.grouped import GroupedExperts
from planmoe_ds.integrations.activation import LayerFacts, device_of, make_engine_layers, report_failure, settings_of
from planmoe_ds.integrations.megatron_limits import check_supported
from planmoe_ds.layer import ExpertParallelLayer
from planmoe_ds.plan import ExpertLayout, Routes, find_routes
from planmoe_ds.session import Session
from planmoe_ds.sharded_experts import forward_sharded, place_of_source


@dataclass(frozen=True)
class MegatronExperts(Experts):
    """Megatron's experts of one rank, whichever class; they multiply by the routes' weights themselves."""

    module: Any
    takes_weights: bool = True
    grouped: GroupedExperts | None = None

    def parameters(self) -> list[nn.Parameter]:
        """The trainable ones."""
        found = self.module.parameters() if self.grouped is None else self.grouped.parameters
        return [parameter for parameter in found if parameter.requires_grad]

    def members(self) -> tuple[nn.Module, ...]:
        """SequentialMLP's experts, unless their projections do more than multiply, such as add gradients up."""
        config = self.module.config
        is_other = type(self.module) is not SequentialMLP or config.moe_apply_probs_on_input
        experts = () if is_other or config.gradient_accumulation_fusion else tuple(self.module.local_experts)
        kinds = {(type(expert), type(expert.linear_fc1), type(expert.linear_fc2)) for expert in experts}
        return experts if kinds == {(MLP, ColumnParallelLinear, RowParallelLinear)} else ()

    def find_groups(self) -> GroupedExperts | None:
        """See Experts."""
        return between(self.members(), "linear_fc1", "linear_fc2")

    def run(self, buffer: torch.Tensor, layout: ExpertLayout, weights: torch.Tensor | None) -> torch.Tensor:
        """Buffer [rows, H] in `layout` and weights [rows] -> outputs [rows, H] in the same places."""
        output, bias = self.module(buffer, torch.tensor(layout.rows_of_expert), weights)
        if bias is not None:
            raise PlanMoEError(f"{type(self.module).__name__} returned a bias apart, which no MoE layer can add")
        return output


@dataclass(frozen=True)
class _Call:
    """What a layer call's stages need of the first one."""

    shape: torch.Size  # of the hidden states
    routing_map: torch.Tensor  # bool [T, E]


class PlanMoEDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """The dispatcher of a PlanMoELayer, which calls run() between its first and its last stage.

    Whoever calls the six stages one by one gets Megatron's own all-to-all: the engine has the experts in its middle.
    """

    planmoe: ExpertParallelLayer
    _call: _Call | None = None

    def dispatch_preprocess(
        self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [..., H] and the router's decision [T, E] -> tokens [T, H] and probs, as they are."""
        self._call = _Call(hidden_states.shape, routing_map)
        return hidden_states.reshape(-1, hidden_states.shape[-1]), probs

    def token_dispatch(self, tokens: torch.Tensor, probs: torch.Tensor, *args: Any) -> Any:
        """Stage by stage: Megatron's own permutation and exchange."""
        call = self._take_call()
        tokens, probs = super().dispatch_preprocess(tokens.view(call.shape), call.routing_map, probs)
        return super().token_dispatch(tokens, probs, *args)

    def run(self, tokens: torch.Tensor, probs: torch.Tensor, experts: nn.Module) -> torch.Tensor:
        """Tokens [T, H] and probs [T, E] -> weighted sums of expert outputs [T, H]."""
        assert self._call is not None
        if self.shared_experts is not None:  # on their own stream, beside everything that follows
            self.shared_experts.pre_forward_comm(tokens.view(self._call.shape))
            self.shared_experts.linear_fc1_forward_and_act()
            self.shared_experts.linear_fc2_forward()
            self.shared_experts.post_forward_comm()
        routes = self._find_routes(self._call.routing_map, probs)
        self._count_stock_bytes(tokens, probs)
        return forward_sharded(self.planmoe, tokens, routes, MegatronExperts(experts), self.tp_size)

    def token_combine(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """After run() nothing is left to exchange."""
        return hidden_states if self._call is not None else super().token_combine(hidden_states, *args, **kwargs)

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """After run(): sums [T, H] -> [..., H], the shared experts' output added."""
        if self._call is None:
            return super().combine_postprocess(hidden_states)
        output = hidden_states.view(self._take_call().shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()

    def _take_call(self) -> _Call:
        call, self._call = self._call, None
        if call is None:
            raise PlanMoEError("dispatch_preprocess must come first in every call of a token dispatcher's stages")
        return call

    def _find_routes(self, routing_map: torch.Tensor, probs: torch.Tensor) -> Routes:
        """Mask [T, E] and probs [T, E] -> routes; only exact results need the routes that fill an expert's capacity.

        Those have probs of zero, which no sum shows, but any number of them per token.
        """
        top_k = self.config.moe_router_topk
        if self.drop_and_pad and self.planmoe.config.resolved_exactness is Exactness.EXACT:
            top_k = self.num_experts
        elif self.drop_and_pad:
            routing_map = routing_map & (probs != 0)
        return find_routes(routing_map, probs, top_k)

    def _count_stock_bytes(self, tokens: torch.Tensor, probs: torch.Tensor) -> None:
        """Tokens and probs out, outputs back, and the same backward; to every tensor-parallel rank of an expert."""
        rows = tokens.shape[0] * self.config.moe_router_topk
        if self.drop_and_pad:
            rows = self.num_experts * get_capacity(rows, self.num_experts, self.moe_expert_capacity_factor)
        row_bytes = 2 * tokens.shape[1] * tokens.element_size() + probs.element_size()
        peers, size = self.planmoe.group.size - 1, self.planmoe.group.size
        passes = 2 if torch.is_grad_enabled() else 1
        self.planmoe.recorder.add_stock_bytes(passes * rows * row_bytes * self.tp_size * peers // size)


class PlanMoELayer(MoELayer):  # type: ignore[misc]
    """A MoELayer whose tokens travel through planmoe; activate() makes them, and sets up those built from a spec."""

    def dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing yet: dispatch, experts and combine are one in routed_experts_compute()."""
        return hidden_states, probs

    def routed_experts_compute(self, hidden_states: torch.Tensor, probs: torch.Tensor, *_: Any) -> Any:
        """Tokens [T, H] and probs [T, E] -> (weighted sums of expert outputs [T, H], no bias)."""
        dispatcher = self.token_dispatcher
        if not isinstance(dispatcher, PlanMoEDispatcher):
            raise PlanMoEError(
                "a PlanMoELayer was called before it was set up: call planmoe_ds.integrations.megatron.activate(model) "
                "on every rank once the model is built"
            )
        return dispatcher.run(hidden_states, probs, self.experts), None


def with_planmoe(moe_spec: Any) -> Any:
    """A MoE layer's spec, as megatron.core's get_moe_module_spec() returns it, for layers that insist on planmoe.

    A ModuleSpec, or with 0.19 and later a functools.partial of MoELayer.
    """
    if isinstance(moe_spec, partial):
        return partial(PlanMoELayer, *moe_spec.args, **moe_spec.keywords)
    return ModuleSpec(module=PlanMoELayer, params=moe_spec.params, submodules=moe_spec.submodules)


def activate(
    model: nn.Module | Sequence[nn.Module], section: object = True, *, settings: Mapping[str, str] | None = None
) -> Session | None:
    """Send every MoELayer of a model, or of the chunks of a pipeline stage, through planmoe.

    Every rank of the job calls this at the same time, after parallel_state.initialize_model_parallel() and after the
    model is built, before its first batch. section: true, false or a mapping of PlanMoEConfig's keys. settings: what
    else all ranks must have in common. Returns None when the section says off. Raises PlanMoEConfigError for what the
    model's config has that planmoe does not support, PlanMoEMismatchError when ranks disagree.
    """
    chunks: list[Any] = [model] if isinstance(model, nn.Module) else list(model)
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    try:
        config = parse_config(section)
        if config.enabled:
            for layer in layers[:1]:
                check_supported(layer.config)
        described = _describe(layers) if config.enabled else {}
    except PlanMoEConfigError as error:
        report_failure(str(error))
        raise
    check_agreement({**settings_of(config), **((settings or {}) if config.enabled else {}), **described})
    if not config.enabled:
        return None
    session = _activate_layers(layers, config)
    for chunk in chunks:
        chunk.planmoe = session
    return session


def _describe(layers: list[MoELayer]) -> dict[str, str]:
    """What ranks that share experts must have in common, by the name a user knows it by."""
    described = {}
    for number, layer in enumerate(layers):
        config, ranks = layer.config, _expert_ranks(layer)
        described[f"MoE layer {number} of ranks {ranks}"] = (
            f"{config.num_moe_experts} experts over {layer.token_dispatcher.ep_size} ranks, hidden size "
            f"{config.hidden_size}, top-{config.moe_router_topk}, capacity factor "
            f"{config.moe_expert_capacity_factor}, padded {config.moe_pad_expert_input_to_capacity}"
        )
    return described


def _expert_ranks(layer: MoELayer) -> list[int]:
    """Global ranks that hold the layer's experts: expert-parallel rank after rank, their tensor-parallel shards."""
    dispatcher = layer.token_dispatcher
    ranks = list(dist.get_process_group_ranks(dispatcher.tp_ep_group))
    expected = dist.get_rank(dispatcher.ep_group) * dispatcher.tp_size + dispatcher.tp_rank
    if ranks.index(dist.get_rank()) != expected:
        raise PlanMoEConfigError(
            f"planmoe expects tensor-parallel ranks next to each other inside the expert-parallel group, but rank "
            f"{dist.get_rank()} is number {ranks.index(dist.get_rank())} of {ranks}, not {expected}: let 'tp' come "
            "before 'ep' in the rank order"
        )
    return ranks


def _activate_layers(layers: list[MoELayer], config: PlanMoEConfig) -> Session:
    totals: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(totals, len(layers))
    if not any(totals):
        raise PlanMoEConfigError("planmoe is on, but the model has no MoE layer: give --num-experts, or leave it off")
    speaks = dist.get_rank() == totals.index(max(totals))
    made = make_engine_layers([_facts(layer) for layer in layers], config, device_of(layers), speaks=speaks)
    for layer, engine_layer in zip(layers, made.layers, strict=True):
        layer.token_dispatcher.planmoe = engine_layer
        layer.token_dispatcher.__class__ = PlanMoEDispatcher
        layer.__class__ = PlanMoELayer
    if speaks:
        dispatcher = layers[0].token_dispatcher
        print(
            f"planmoe: active on {len(layers)} MoE layers of this pipeline stage: {made.description}, expert-parallel "
            f"size {dispatcher.ep_size}, expert-tensor-parallel size {dispatcher.tp_size}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return made.session()


def _facts(layer: MoELayer) -> LayerFacts:
    config, dispatcher, ranks = layer.config, layer.token_dispatcher, _expert_ranks(layer)
    return LayerFacts(
        group=str(ranks), ranks=ranks, hidden_size=config.hidden_size, dtype=next(layer.experts.parameters()).dtype,
        top_k=config.moe_router_topk * dispatcher.tp_size, num_experts=config.num_moe_experts * dispatcher.tp_size,
        place_of_source=place_of_source(dispatcher.ep_size, dispatcher.tp_size),
    )  # fmt: skip
