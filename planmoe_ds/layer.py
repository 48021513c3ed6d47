"""The data's path through one MoE layer: start reading here.

Shape legend: T tokens, K routes per token, H hidden size, N rows of this rank (one per kept route).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from planmoe_ds.config import Exactness, PlanMoEConfig
from planmoe_ds.experts import LocalExperts
from planmoe_ds.group import ExpertGroup
from planmoe_ds.grouped import GroupedExperts, recognise
from planmoe_ds.pipeline import Codecs, LayerCall, run_experts
from planmoe_ds.plan import Header, PlanRequest, Routes, build_plan
from planmoe_ds.recorder import Label, Recorder
from planmoe_ds.rows import RowOrder, order_rows
from planmoe_ds.wire import token_columns


@dataclass(kw_only=True)
class ExpertParallelLayer:
    """One MoE layer's dispatch, experts and combine; holds nothing of a call in flight."""

    index: int
    config: PlanMoEConfig
    group: ExpertGroup
    codecs: Codecs
    recorder: Recorder
    _leaves_checked: bool = field(default=False, init=False)
    _grouped: GroupedExperts | None = field(default=None, init=False)  # of the last experts
    _modules: tuple[nn.Module, ...] = field(default=(), init=False)

    def forward(self, tokens_TH: torch.Tensor, routes: Routes, experts: LocalExperts) -> torch.Tensor:
        """Tokens [T, H] and the router's decision -> the weighted sum of the experts' outputs, [T, H]."""
        if self.config.resolved_exactness is not Exactness.EXACT:
            return self._run(tokens_TH, routes, experts, None)
        order = self.order(routes)
        return combine(self._run(tokens_TH, routes, experts, order), order.row_of_route_KT, routes.weight_KT)

    def order(self, routes: Routes) -> RowOrder:
        """The order of this rank's rows."""
        config = self.config
        return order_rows(
            routes.expert_KT, routes.slot_KT, routes.num_experts, self.num_chunks, config.chunk_by, self.group.size
        )

    def route_outputs(self, tokens_TH: torch.Tensor, routes: Routes, experts: LocalExperts) -> torch.Tensor:
        """Tokens [T, H] that have one route each -> the experts' outputs [T, H], not weighted."""
        order = self.order(routes)
        return self._run(tokens_TH, routes, experts, order).index_select(0, order.row_of_route_KT)

    def _run(
        self, tokens_TH: torch.Tensor, routes: Routes, experts: LocalExperts, order: RowOrder | None
    ) -> torch.Tensor:
        columns = token_columns(routes.expert_KT, routes.weight_KT, routes.num_experts, order)
        header = Header(self.index, tokens_TH.shape[1], tokens_TH.element_size(), routes.expert_KT.shape[0])
        request = PlanRequest(
            num_chunks=self.num_chunks,
            chunk_by=self.config.chunk_by,
            header=header,
            row_bytes=tokens_TH.shape[1] * tokens_TH.element_size(),
            padded_capacity=routes.capacity if self._recreates_padding else None,
            row_order=order,
        )
        label = Label("plan", self.index, -1, "forward")
        plan = build_plan(routes.expert_KT, routes.num_experts, self.group, request, self.recorder, label)
        keep_graph = torch.is_grad_enabled()
        check_leaves = keep_graph and not self._leaves_checked
        token_N = None if order is None else order.token_N
        call = LayerCall(
            plan, columns, tokens_TH.shape[1], tokens_TH.dtype, self._with_groups(experts), self.group, self.codecs,
            self.recorder, self.index, token_N, keep_graph, check_leaves,
        )  # fmt: skip
        result = run_experts(tokens_TH.contiguous(), routes.weight_KT, call)
        self._leaves_checked |= check_leaves
        return result

    def _with_groups(self, experts: LocalExperts) -> LocalExperts:
        """The experts with what is known of running them together, looked up once; exact results do without."""
        if self.config.resolved_exactness is Exactness.EXACT:
            return experts
        modules = tuple(experts.modules)
        if modules != self._modules:
            self._modules, self._grouped = modules, recognise(modules)
        return replace(experts, grouped=self._grouped)

    @property
    def num_chunks(self) -> int:
        """Chunks in force: one where nothing travels."""
        return self.config.chunks if self.group.size > 1 else 1

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
