"""What ranks tell each other through the job's key-value store: that they live, where they are, and why they stop."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import NamedTuple

from torch.distributed.distributed_c10d import PrefixStore, Store

from planmoe_ds.job_store import job_store
from planmoe_ds.stopping import Reason

_FAILED = "failed"


class Position(NamedTuple):
    """Where a rank is: exchange `number` of group `group` (-1: none yet), `what` it does, `since` (time.time())."""

    group: int
    number: int
    what: str
    since: float
    waits: bool

    def describe(self) -> str:
        """A clause such as "waits in layer 3 forward, dispatch of chunk 1, for 2.1 s"."""
        verb = "waits in" if self.waits else "was last in"
        return f"{verb} {self.what}, for {max(0.0, time.time() - self.since):.1f} s"


class Notices:
    """One rank's part of them, and a view of the others'; collective to make: it names the round of this job's store.

    Every call asks the store: it may take as long as that does, and raises RuntimeError when the store fails.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._store = _own_store(rank)
        self._beat = 0
        self._told: Position | None = None

    def tell(self, position: Position) -> None:
        """This rank lives, and is there."""
        self._beat += 1
        self._store.set(f"pulse/{self._rank}", str(self._beat))
        if position != self._told:
            self._store.set(f"position/{self._rank}", json.dumps(position._asdict()))
            self._told = position

    def pulse(self, peer: int) -> bytes:
        """Another one each time that the rank told that it lives."""
        return self._found(f"pulse/{peer}") or b""

    def position(self, peer: int) -> Position | None:
        """None where it has told nothing yet."""
        found = self._found(f"position/{peer}")
        return None if found is None else Position(**json.loads(found))

    def where_all_are(self, ranks: Iterable[int], own: Position) -> str:
        """A line for each of them, as far as the store answers; never fails."""
        lines = []
        with contextlib.suppress(RuntimeError):
            for rank in ranks:
                place = own if rank == self._rank else self.position(rank)
                lines.append(f"  rank {rank} " + ("has told nothing yet" if place is None else place.describe()))
        return "\n".join(["where the ranks are:", *lines])

    def tell_end(self, passed: Mapping[int, int]) -> None:
        """This rank ends its program; `passed`: by group, the last exchange that it got past."""
        self._store.set(f"ended/{self._rank}", json.dumps(passed))

    def passed_before_end(self, peer: int, group: int) -> int | None:
        """The last exchange of the group that a rank got past before it ended (-1: none); None while it runs."""
        found = self._found(f"ended/{peer}")
        return None if found is None else int(json.loads(found).get(str(group), -1))

    def reason(self) -> Reason | None:
        """Why all stop, if somebody said so."""
        found = self._found(_FAILED)
        return None if found is None else Reason(**json.loads(found))

    def give(self, reason: Reason) -> Reason:
        """The reason for all ranks: this one, unless another one came first."""
        return Reason(**json.loads(self._store.compare_set(_FAILED, "", json.dumps(asdict(reason)))))

    def _found(self, key: str) -> bytes | None:
        return self._store.get(key) if self._store.check([key]) else None


def _own_store(rank: int) -> Store:
    store = job_store()
    round_number = store.add(f"watchdogs/{rank}", 1)
    if hasattr(store, "clone"):
        with contextlib.suppress(RuntimeError, NotImplementedError):
            store = store.clone()  # a connection of its own: the program may block on the other one
    return PrefixStore(f"watch/{round_number}", store)
