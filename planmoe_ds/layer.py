"""The data's path through one MoE layer: start reading here.

Shape legend: T tokens, K routes per token, H hidden size, N rows sent (one per kept route).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from planmoe_ds.config import Exactness, PlanMoEConfig
from planmoe_ds.experts import LocalExperts
from planmoe_ds.group import ExpertGroup
from planmoe_ds.pipeline import Codecs, LayerCall, run_experts
from planmoe_ds.plan import Header, Routes, RowOrder, build_plan, order_rows
from planmoe_ds.recorder import Label, Recorder


@dataclass(kw_only=True)
class ExpertParallelLayer:
    """One MoE layer's dispatch, experts and combine; holds nothing of a call in flight."""

    index: int
    config: PlanMoEConfig
    group: ExpertGroup
    codecs: Codecs
    recorder: Recorder
    _leaves_checked: bool = field(default=False, init=False)

    def forward(self, tokens_TH: torch.Tensor, routes: Routes, experts: LocalExperts) -> torch.Tensor:
        """Tokens [T, H] and the router's decision -> the weighted sum of the experts' outputs, [T, H]."""
        order = self.order(routes, len(experts.modules))
        rows_NH = self.expert_rows(tokens_TH, order, routes, experts)
        return combine(rows_NH, order.row_of_route_KT, routes.weight_KT)

    def order(self, routes: Routes, experts_per_rank: int) -> RowOrder:
        """The order in which this rank's rows leave."""
        return order_rows(routes, self.num_chunks, self.config.chunk_by, experts_per_rank)

    def expert_rows(
        self, tokens_TH: torch.Tensor, order: RowOrder, routes: Routes, experts: LocalExperts
    ) -> torch.Tensor:
        """Tokens [T, H] -> the experts' outputs for this rank's rows, [N, H], not weighted yet."""
        header = Header(self.index, tokens_TH.shape[1], tokens_TH.element_size())
        padded = routes.capacity if self._recreates_padding else None
        label = Label("plan", self.index, -1, "forward")
        plan = build_plan(order, self.group, header, padded, self.recorder, label)
        keep_graph = torch.is_grad_enabled()
        check_leaves = keep_graph and not self._leaves_checked
        call = LayerCall(plan, experts, self.group, self.codecs, self.recorder, self.index, keep_graph, check_leaves)
        rows_NH = run_experts(tokens_TH.contiguous(), call)
        self._leaves_checked |= check_leaves
        return rows_NH

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
