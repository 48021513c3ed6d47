"""Times a layer with the framework's own dispatch too, and goes back to it where that is faster.

Fewer bytes and overlap may gain less than planmoe's own work costs: small layers on fast links wait for the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from planmoe_ds.auto_planner import Planner
from planmoe_ds.backend import Clock, Stamp
from planmoe_ds.choose import TIE, in_words
from planmoe_ds.group import ExpertGroup
from planmoe_ds.headers import in_backward
from planmoe_ds.planner import MEASURED, WARM_UP

_CALLS = WARM_UP + MEASURED  # of either
PATIENCE = 200  # calls: then one that waits for its backward counts as given up
TRIAL_CALLS = 2 * _CALLS + 1  # planmoe's, stock's, and planmoe's in which the ranks decide

_ITS_LIMIT = (
    "It needs equal numbers of tokens on all ranks in every call; where they may differ, "
    'a setting of your own, such as "chunks": 1, stays with planmoe\'s'
)

Layer = Callable[[torch.Tensor], torch.Tensor]  # hidden states [..., H] -> output [..., H]


@dataclass
class _Times:
    """When one call's forward and backward began and ended."""

    forward: list[Stamp] = field(default_factory=list)
    backward: list[Stamp] = field(default_factory=list)

    def seconds(self) -> float:
        """Both passes; on an accelerator once they are done."""
        return sum(end.ns() - start.ns() for start, end in (self.forward, self.backward)) * 1e-9


class StockTrial:
    """Which of two dispatches a layer uses, the same on all ranks of its group.

    Once the planner has settled, some calls with planmoe and some with the framework's dispatch are timed, forward and
    backward. The dispatch only changes while no call waits for its backward: what is recomputed there must be what ran.
    is_uneven: whether ranks have had different numbers of tokens, the same on all ranks after a call of planmoe's; the
    framework's dispatch cannot do that.
    """

    def __init__(
        self,
        group: ExpertGroup,
        planner: Planner,
        report: Callable[[str, str], None],
        is_uneven: Callable[[], bool] = lambda: False,
    ) -> None:
        self._group, self._planner, self._report, self._is_uneven = group, planner, report, is_uneven
        self._clock = Clock(group.comm.device)
        self._times: dict[bool, list[_Times]] = {False: [], True: []}  # by uses_stock
        self._num_open = 0
        self._since_change = 0  # calls that began while others waited for their backward
        self._stock_wins: bool | None = None
        self._is_over = False
        self.uses_stock = False

    def run(self, hidden: torch.Tensor, planmoe: Layer, stock: Layer) -> torch.Tensor:
        """The layer on hidden states [..., H], one way or the other; every rank of the group calls this."""
        is_fresh = torch.is_grad_enabled() and not in_backward()
        if self._is_over or not is_fresh or not hidden.requires_grad or not self._planner.is_settled:
            return (stock if self.uses_stock else planmoe)(hidden)
        self._since_change += 1
        if self._num_open == 0:
            self._since_change = 0
            self._change()
        elif self._since_change > PATIENCE:
            self._stay("not all forward passes had a backward one, so no other was timed")
        layer = stock if self.uses_stock else planmoe
        if self._is_over:
            return layer(hidden)
        output = self._run_timed(hidden, layer)
        if self._stock_wins is None and not self.uses_stock and self._times[True]:
            self._decide()  # after a call of planmoe's, which has found the ranks to be in step
        return output

    def _change(self) -> None:
        """Take the other dispatch when there are times enough of this one, and in the end the better one."""
        if not self.uses_stock and self._is_uneven():
            self._stay("ranks have different numbers of tokens, which the framework's cannot do")
        elif self._stock_wins is not None:
            self._is_over, self.uses_stock = True, self._stock_wins
        elif self.uses_stock:
            self.uses_stock = len(self._times[True]) < _CALLS
        else:
            self.uses_stock = len(self._times[False]) >= _CALLS

    def _stay(self, reason: str) -> None:
        self._is_over, self.uses_stock = True, False
        self._report("planmoe's dispatch", reason)

    def _run_timed(self, hidden: torch.Tensor, layer: Layer) -> torch.Tensor:
        times, found = _Times(), self._times[self.uses_stock]

        def begin(_: torch.Tensor) -> None:
            if not times.backward:
                times.backward.append(self._clock.stamp())

        def end(_: torch.Tensor) -> None:
            if len(times.backward) == 1:  # not in a second backward pass
                times.backward.append(self._clock.stamp())
                self._num_open -= 1
                found.append(times)

        self._num_open += 1
        times.forward.append(self._clock.stamp())
        marked = hidden.view_as(hidden)  # hooks, which leave tensors that may be changed in place
        marked.register_hook(end)
        output = layer(marked)
        output.register_hook(begin)
        times.forward.append(self._clock.stamp())
        return output

    def _decide(self) -> None:
        seconds = [
            statistics.median(times.seconds() for times in self._times[way][-MEASURED:]) for way in (False, True)
        ]
        total = self._group.sum_of_ranks(
            torch.tensor(seconds, dtype=torch.float64), "comparing planmoe's dispatch with the framework's"
        )
        ours, theirs = (total / self._group.size).tolist()
        self._stock_wins = theirs * (1 + TIE) < ours
        times = f"a layer took {in_words(ours)} with planmoe and {in_words(theirs)} without, forward and backward"
        if self._stock_wins:
            self._report("the framework's own dispatch from now on", f"{times}. {_ITS_LIMIT}")
        else:
            self._report("planmoe's dispatch", times)
