"""Lets a layer's first calls decide its number of chunks and its order, and decides anew when their times drift.

The layer runs with one chunk, then with four; both are timed. All ranks of a group add up their times, its first rank
decides, and all follow from the same call on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch

from planmoe_ds.choose_chunks import CANDIDATES, TRIALS, LayerCosts, ScheduleChoice, choose_schedule
from planmoe_ds.compression import AUTO
from planmoe_ds.config import Exactness, PlanMoEConfig
from planmoe_ds.group import ExpertGroup
from planmoe_ds.plan_store import PlanStore
from planmoe_ds.planner import CallOrders, LayerPlanner
from planmoe_ds.scheduling import Schedule
from planmoe_ds.trace import Phase

_SCHEDULERS = ("sequential", "pipelined", "optimal")


@dataclass
class ChoiceLog:
    """What layers decided and why: told once all of them have, on the one rank that speaks, and again after drift."""

    speaks: bool
    num_waiting: int = 0
    _found: dict[str, tuple[list[int], str]] = field(default_factory=dict)

    def report(self, layer: int, choice: str, reason: str) -> None:
        """A layer's decision; layers that decide alike share a line, with the first one's reason."""
        self._found.setdefault(choice, ([], reason))[0].append(layer)
        self.num_waiting = max(0, self.num_waiting - 1)
        if self.num_waiting > 0:
            return
        found, self._found = self._found, {}
        if self.speaks:
            for words, (layers, why) in found.items():
                print(f"planmoe: MoE layers {', '.join(map(str, layers))}: {words}: {why}", file=sys.stderr, flush=True)


class Planner(Protocol):
    """Decides in how many chunks, and in which order, a layer's next call runs."""

    @property
    def num_chunks(self) -> int:
        """Of the next call."""
        ...

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to be learnt before drift."""
        ...

    def next_call(self, facts: Mapping[str, str]) -> CallOrders:
        """The orders of a call with `num_chunks` chunks; every rank of the group asks at the same time.

        facts: what its costs depend on, by name; the same in every call.
        """
        ...

    def schedules(self) -> dict[Phase, Schedule]:
        """The orders in force at the costs that were learnt; empty while nothing was."""
        ...


class AutoPlanner:
    """A planner that first tries numbers of chunks."""

    def __init__(
        self,
        candidates: tuple[int, ...],
        scheduler: str | None,
        group: ExpertGroup,
        max_in_flight: int | None,
        store: PlanStore | None,
        report: Callable[[str, str], None],
    ) -> None:
        self._candidates, self._scheduler = candidates, scheduler
        self._group, self._max_in_flight, self._store, self._report = group, max_in_flight, store, report
        self._trials = candidates if len(candidates) == 1 else TRIALS
        self._learnt: dict[int, LayerCosts] = {}
        self._is_first, self._has_chosen = True, False
        self._current = self._try(self._trials[0])

    @property
    def num_chunks(self) -> int:
        """Of the next call."""
        return self._current.num_chunks

    @property
    def is_settled(self) -> bool:
        """See Planner."""
        return self._has_chosen and self._current.is_settled

    def next_call(self, facts: Mapping[str, str]) -> CallOrders:
        """See Planner."""
        is_first, self._is_first = self._is_first, False
        kept = self._store.load(self._group, facts) if is_first and self._store is not None else None
        orders = self._current.next_call(facts)
        if kept is None:
            self._advance()
        else:
            self._has_chosen = True
            self._current = self._try(kept.shape[1], self._store)
            self._current.resume(kept)
            self._report(_count(kept.shape[1]), "kept from an earlier run")
        return orders

    def schedules(self) -> dict[Phase, Schedule]:
        """See Planner."""
        return self._current.schedules()

    def _try(self, num_chunks: int, store: PlanStore | None = None, scheduler: str = "optimal") -> LayerPlanner:
        return LayerPlanner(scheduler, self._group, num_chunks, self._max_in_flight, store, fresh=True)

    def _advance(self) -> None:
        """What the next call does differently."""
        if self._has_chosen:
            if self._current.num_drifts > 0:
                self._report("times drifted", "the next calls decide anew")
                self._has_chosen, self._learnt = False, {}
                self._current = self._try(self._trials[0])
            return
        forward, backward = self._current.costs
        if forward is None:
            return
        self._learnt[self.num_chunks] = LayerCosts(forward, backward, self._current.host_seconds)
        if len(self._learnt) < len(self._trials):
            self._current = self._try(self._trials[len(self._learnt)])
            return
        choice = self._agreed_choice()
        self._report(f"{_count(choice.num_chunks)} in {choice.scheduler} order", choice.reason)
        self._has_chosen = True
        self._current = self._try(choice.num_chunks, self._store, choice.scheduler)

    def _agreed_choice(self) -> ScheduleChoice:
        """What the group's first rank decides."""
        found = torch.zeros(2, dtype=torch.int64)
        names = _SCHEDULERS if self._scheduler is None else (self._scheduler,)
        choice = ScheduleChoice(1, names[0], "", {})
        if self._group.rank == 0:
            choice = choose_schedule(self._learnt, self._candidates, self._scheduler, self._max_in_flight)
            found = torch.tensor([choice.num_chunks, names.index(choice.scheduler)])
        num_chunks, place = self._group.told_by_first(found, "agreeing on the number of chunks").tolist()
        return ScheduleChoice(num_chunks, names[place], choice.reason, choice.seconds)


def make_planner(
    config: PlanMoEConfig, group: ExpertGroup, layer: int, store: PlanStore | None, log: ChoiceLog
) -> Planner:
    """The planner that a layer's config asks for."""
    scheduler, learns = None if config.scheduler == AUTO else config.scheduler, not config.deterministic
    if group.size == 1:  # nothing travels
        return LayerPlanner(scheduler or "sequential", group, 1, config.max_in_flight, store, learns=learns)
    if isinstance(config.chunks, int) and scheduler is not None:
        return LayerPlanner(scheduler, group, config.chunks, config.max_in_flight, store, learns=learns)
    if isinstance(config.chunks, int):
        candidates: tuple[int, ...] = (config.chunks,)
    else:  # exact results are the framework's only with its GEMMs' shapes
        candidates = (1,) if config.resolved_exactness is Exactness.EXACT else CANDIDATES
    log.num_waiting += 1
    return AutoPlanner(candidates, scheduler, group, config.max_in_flight, store, partial(log.report, layer))


def _count(num_chunks: int) -> str:
    return f"{num_chunks} chunk" + "s" * (num_chunks > 1)
