"""The data's path through one MoE layer: start reading here.

Shape legend: T tokens, K routes per token, H hidden size, N rows of this rank (one per kept route).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from planmoe_ds import __version__
from planmoe_ds.auto_planner import ChoiceLog, Planner, make_planner
from planmoe_ds.chunking import Chunking, chunking_of
from planmoe_ds.codecs import Codecs
from planmoe_ds.compression import CompressionConfig
from planmoe_ds.config import Exactness, PlanMoEConfig
from planmoe_ds.counts import Talk
from planmoe_ds.errors import PlanMoEError
from planmoe_ds.experts import Experts
from planmoe_ds.group import ExpertGroup
from planmoe_ds.grouped import GroupedExperts
from planmoe_ds.guard import Meter, QualityGuard
from planmoe_ds.headers import PLAN_PHASE, Header, digest, dtype_code, in_backward, phase_now
from planmoe_ds.pipeline import LayerCall, run_experts
from planmoe_ds.plan import BufferRequest, Routes, RoutingPlan, build_plan
from planmoe_ds.plan_store import PlanStore
from planmoe_ds.planner import CallOrders
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.refusals import Refusals
from planmoe_ds.rows import RowOrder, add_at, order_rows
from planmoe_ds.wire import token_columns


@dataclass(kw_only=True)
class ExpertParallelLayer:
    """One MoE layer's dispatch, experts and combine; holds nothing of a call in flight.

    place_of_source: in which order the rows of the group's ranks lie before an expert; None: by rank.
    """

    index: int
    config: PlanMoEConfig
    group: ExpertGroup
    codecs: Codecs
    recorder: Recorder
    place_of_source: tuple[int, ...] | None = None
    guard: QualityGuard | None = None  # its codecs are in force, where there is one
    log: ChoiceLog = field(default_factory=partial(ChoiceLog, speaks=False))
    has_been_uneven: bool = field(default=False, init=False)  # ranks with different numbers of tokens, in any call
    _leaves_checked: bool = field(default=False, init=False)
    _grouped: GroupedExperts | None = field(default=None, init=False)  # of the last experts
    _modules: tuple[nn.Module, ...] = field(default=(), init=False)
    _num_calls: int = field(default=0, init=False)
    _refusals: Refusals = field(init=False)
    _decided: tuple[int, CallOrders] | None = field(default=None, init=False)  # chunks and orders of the last call
    _planner: Planner = field(init=False)

    def __post_init__(self) -> None:
        store = None if self.config.plans is None else PlanStore(Path(self.config.plans), self.index)
        self._refusals = Refusals(self.index, speaks=self.group.rank == 0)
        self._planner = make_planner(self.config, self.group, self.index, store, self.log)

    def forward(self, tokens_TH: torch.Tensor, routes: Routes, experts: Experts) -> torch.Tensor:
        """Tokens [T, H] and the router's decision -> the weighted sum of the experts' outputs, [T, H]."""
        if self.config.resolved_exactness is not Exactness.EXACT:
            return self._run(tokens_TH, routes, experts, None)
        order = self.order(routes)
        rows_NH = self._run(tokens_TH, routes, experts, order)
        if experts.takes_weights:
            return add_up(rows_NH, order.token_N, tokens_TH.shape[0])
        return combine(rows_NH, order.row_of_route_KT, routes.weight_KT)

    def order(self, routes: Routes) -> RowOrder:
        """The order of this rank's rows."""
        return order_rows(routes.expert_KT, routes.slot_KT, routes.num_experts, self._chunking, self.group.size)

    @property
    def _chunking(self) -> Chunking:
        comm = self.group.comm
        return chunking_of(self.config.chunk_by, self.num_chunks, comm.node_of_rank, self.group.rank)

    def route_outputs(self, tokens_TH: torch.Tensor, routes: Routes, experts: Experts) -> torch.Tensor:
        """Tokens [T, H] that have one route each -> the experts' outputs [T, H], not weighted."""
        order = self.order(routes)
        return self._run(tokens_TH, routes, experts, order).index_select(0, order.row_of_route_KT)

    def _run(self, tokens_TH: torch.Tensor, routes: Routes, experts: Experts, order: RowOrder | None) -> torch.Tensor:
        if tokens_TH.device.type != self.group.comm.device.type:
            raise PlanMoEError(
                f"planmoe was activated when layer {self.index} was on {self.group.comm.device}, and its tokens are on "
                f"{tokens_TH.device}: move the model to its device before activate()"
            )
        columns = token_columns(routes.expert_KT, routes.weight_KT, routes.num_experts, order)
        header = self._header(tokens_TH, routes)
        label = Label("plan", self.index, -1, "forward")
        dispatch = self._codecs_in_force.dispatch.for_rows(tokens_TH.dtype)
        talk = Talk(
            num_experts=routes.num_experts,
            chunking=self._chunking,
            header=header,
            row_bytes=tokens_TH.shape[1] * tokens_TH.element_size(),
            notes=self._notes(tokens_TH),
            group=self.group,
            recorder=self.recorder,
            label=label,
            first_note=dispatch.misfits(tokens_TH.contiguous()) if dispatch.may_refuse else None,
        )
        buffer = BufferRequest(
            padded_capacity=routes.capacity if self._recreates_padding else None,
            row_order=order,
            place_of_source=self.place_of_source,
        )
        with self.group.working(label.describe(), PLAN_PHASE):
            plan = build_plan(routes.expert_KT, talk, buffer)
            orders = self._next_orders(header)
        self.recorder.add_load(self.index, routes.expert_KT, routes.num_experts)
        keep_graph = torch.is_grad_enabled()
        codecs, meter = self._agreed_codecs(plan, tokens_TH.dtype, keep_graph)
        check_leaves = keep_graph and not self._leaves_checked
        call = LayerCall(
            plan, columns, tokens_TH.shape[1], tokens_TH.dtype, self._with_groups(experts, tokens_TH.device),
            self.group, codecs, self.recorder, self.index, order, keep_graph, check_leaves, orders, self._refusals,
            meter,
        )  # fmt: skip
        result = run_experts(tokens_TH.contiguous(), routes.weight_KT, call)
        self._leaves_checked |= check_leaves
        return result

    def _next_orders(self, header: Header) -> CallOrders:
        """What is recomputed in a backward pass goes as the last call did, so that it finds the same tensors."""
        if self._decided is None or not in_backward():
            num_chunks, facts = self._planner.num_chunks, {} if self.config.plans is None else self._facts(header)
            self._decided = num_chunks, self._planner.next_call(facts)
        return self._decided[1]

    def _with_groups(self, experts: Experts, device: torch.device) -> Experts:
        """The experts with what is known of running them together, looked up once; exact results do without."""
        if device.type == "cpu" or self.config.resolved_exactness is Exactness.EXACT:
            return experts
        modules = experts.members()
        if modules != self._modules or not (self._grouped is None or self._grouped.is_current()):
            self._modules, self._grouped = modules, experts.find_groups() if modules else None
        return experts if self._grouped is None else experts.with_groups(self._grouped)

    def _header(self, tokens_TH: torch.Tensor, routes: Routes) -> Header:
        self._num_calls += 1
        return Header(
            job=self.group.job,
            layer=self.index,
            phase=phase_now(),
            call=self._num_calls - 1,
            num_chunks=self.num_chunks,
            hidden_size=tokens_TH.shape[1],
            dtype=dtype_code(tokens_TH.dtype),
            routes_per_token=routes.expert_KT.shape[0],
            num_experts=routes.num_experts,
            settings=self._settings,
        )

    @cached_property
    def _settings(self) -> int:
        return digest(f"{__version__} {self.config.model_dump_json()}")

    def _facts(self, header: Header) -> dict[str, str]:
        """What the layer's times depend on, for those that are kept."""
        config = self.config
        assert isinstance(config.compression, CompressionConfig)  # "auto" was resolved before
        return {
            "hidden size": str(header.hidden_size),
            "dtype": str(header.dtype),
            "experts": str(header.num_experts),
            "top-k": str(header.routes_per_token),
            "all-to-all": self.group.choice.name,
            "chunks": f"{config.chunks} by {config.chunk_by.value}",
            "codecs": config.compression.describe(),
        }

    def _notes(self, tokens_TH: torch.Tensor) -> tuple[int, ...]:
        """For the other ranks: whether tokens do not fit their codec, how many they are, codecs' errors."""
        num_tokens = tokens_TH.shape[0]
        return 0, num_tokens, -num_tokens, *([] if self.guard is None else self.guard.notes())

    def _agreed_codecs(self, plan: RoutingPlan, dtype: torch.dtype, trains: bool) -> tuple[Codecs, Meter | None]:
        """The codecs of a call, the same on all ranks of the group; with a meter if they are to be measured."""
        misfits, most, least, *errors = plan.notes
        self.has_been_uneven |= most != -least
        codecs, meter = self.codecs, None
        if self.guard is not None:
            codecs = self.guard.follow(errors, dtype, speaks=self.group.rank == 0)
            meter = self.guard.next_step() if trains else None
        return codecs.with_raw_tokens() if misfits else codecs, meter

    @property
    def _codecs_in_force(self) -> Codecs:
        return self.codecs if self.guard is None else self.guard.codecs

    @property
    def planner(self) -> Planner:
        """Decides the number of this layer's chunks, and the order of their tasks."""
        return self._planner

    @property
    def num_chunks(self) -> int:
        """Chunks of the next call, in a backward pass of the one before it; one where nothing travels."""
        return self._decided[0] if self._decided is not None and in_backward() else self._planner.num_chunks

    @property
    def _recreates_padding(self) -> bool:
        """Exact results need the padded shape of the framework's GEMMs, which several chunks do not have anyway."""
        return self.config.resolved_exactness is Exactness.EXACT and self.num_chunks == 1


def combine(rows_NH: torch.Tensor, row_of_route_KT: torch.Tensor, weight_KT: torch.Tensor) -> torch.Tensor:
    """Weighted sum of every token's expert outputs, [T, H] in the rows' dtype; a dropped route adds zero.

    row_of_route_KT: int64 [K * T], N for dropped routes. Product and sum are in the wider of the rows' and the
    weights' dtypes, route after route, as DeepSpeed's decode does.
    """
    num_routes, num_tokens = weight_KT.shape
    hidden = rows_NH.shape[1]
    with_zero_row = torch.cat([rows_NH, rows_NH.new_zeros((1, hidden))])
    routed_KTH = with_zero_row.index_select(0, row_of_route_KT).view(num_routes, num_tokens, hidden)
    return (routed_KTH * weight_KT.unsqueeze(-1)).sum(0).to(rows_NH.dtype)


def add_up(rows_NH: torch.Tensor, token_N: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Sum of every token's rows, [T, H] in the rows' dtype, row after row; token_N: int64 [N]."""
    return add_at(rows_NH.new_zeros((num_tokens, rows_NH.shape[1])), token_N, rows_NH)
