"""A persistent pool of rank processes: `RankPool.run` calls a function on every rank of a process group.

In a test, through the session fixture `ranks`:

    def sum_of_ranks(offset: int) -> int:            # top level: the ranks import it by name
        value = torch.tensor(dist.get_rank() + offset)
        dist.all_reduce(value)
        return int(value)

    def test_sum(ranks):
        assert ranks.run(4, sum_of_ranks, 10) == [46] * 4
"""

from __future__ import annotations

import os
import random
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from tests.harness.calls import Arguments, Environment, make_calls, per_rank_environments
from tests.harness.conversation import RankError, RankTimeout, converse, describe
from tests.harness.forks import ForkServer
from tests.harness.process import RankProcess, start_environment
from tests.harness.wire import Call, RankOutcome

__all__ = ["MAX_RANKS", "RankError", "RankOutcome", "RankPool", "RankTimeout"]

MAX_RANKS = 8


class RankPool:
    """Up to eight rank processes, started when first needed and kept, with torch imported.

    preload: with DeepSpeed as well. NCCL: ranks share GPUs where there are fewer, and it takes `ranks_per_host` of
    them (0: all) to be on one host. makes_room: a call ends the kept processes of other such pools, unless told
    otherwise NCCL's: a GPU bears so many processes only.
    """

    _making_room: ClassVar[weakref.WeakSet[RankPool]] = weakref.WeakSet()

    def __init__(
        self, backend: str = "gloo", preload: bool = True, ranks_per_host: int = 0, makes_room: bool | None = None
    ) -> None:
        self._backend = backend
        if backend == "nccl" if makes_room is None else makes_room:
            self._making_room.add(self)
        self._ranks_per_host = ranks_per_host
        self._preload = preload
        self._processes: dict[int, RankProcess] = {}  # by rank
        self._servers: list[ForkServer] = []
        self._hash_seeds = random.SystemRandom().sample(range(1 << 32), 2)
        self._num_paths = 0
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 60.0,
        env: Environment = None,
        per_rank_args: Sequence[Sequence[Any]] | None = None,
        expect_failure: bool = False,
        fresh: bool = False,
        bare: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `function(*args, *per_rank_args[rank], **kwargs)` on every rank; return one result per rank.

        `env` is one mapping for all ranks or one per rank. `timeout` (seconds) does not count imports.
        `expect_failure` returns one `RankOutcome` per rank, failed or not, instead of results. `fresh` uses
        new processes for this call alone, `bare` new interpreters, started with `env` and without DeepSpeed imported.
        Skips the test where NCCL has fewer GPUs than ranks, unless it is told that they may share them.
        Raises `RankError`, `RankTimeout`, and `ValueError` for arguments that do not fit `world_size`.
        """
        if not 1 <= world_size <= MAX_RANKS:
            raise ValueError(f"world_size is {world_size}, expected 1 to {MAX_RANKS}")
        if self._backend == "nccl" and not os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE"):
            cards = torch.cuda.device_count()
            if world_size > cards:
                pytest.skip(f"{world_size} ranks, {cards} GPUs, and NCCL_MULTI_RANK_GPU_ENABLE (NCCL 2.30) is not set")
        environments = per_rank_environments(env, world_size)
        arguments = Arguments(args, kwargs, per_rank_args)
        environments = [{**self._place(rank), **env} for rank, env in enumerate(environments)]
        calls = make_calls(function, arguments, environments, self._new_path("store"))
        fresh |= bare
        if self in self._making_room:
            for pool in self._making_room - {self}:
                pool.end_processes()
        everyone = range(world_size)
        processes = self._start(everyone, environments, forks=not bare) if fresh else self._reuse(world_size)
        outcomes = _converse_or_kill(processes, calls, timeout, expect_failure)
        try:
            if not expect_failure and any(outcome.failed for outcome in outcomes):
                message = describe(function.__qualname__, outcomes, processes)
                raise RankError(f"{message}\n(PYTHONHASHSEED by rank in turn: {self._hash_seeds})", outcomes)
        finally:
            if fresh:
                _kill(processes)
        return outcomes if expect_failure else [outcome.result for outcome in outcomes]

    def end_processes(self) -> None:
        """End those that are kept; the next call starts new ones."""
        processes, self._processes = list(self._processes.values()), {}
        _kill(processes)

    def close(self) -> None:
        """End every process and delete the pool's files."""
        try:
            self.end_processes()
        finally:
            self._close(self._servers)
            self._folder.cleanup()

    def _reuse(self, world_size: int) -> list[RankProcess]:
        alive = {rank for rank, process in self._processes.items() if process.is_alive}
        missing = [rank for rank in range(world_size) if rank not in alive]
        environments = [self._place(rank) for rank in missing]
        started = self._start(missing, environments, forks=self._preload, preload=self._preload)
        self._processes.update(zip(missing, started, strict=True))
        return [self._processes[rank] for rank in range(world_size)]

    def _place(self, rank: int) -> dict[str, str]:
        """Which GPU and which host are the rank's, and where it finds the links' costs: nobody else's."""
        caches = {"XDG_CACHE_HOME": str(Path(self._folder.name) / "cache")}
        if self._backend != "nccl":
            return caches
        host = {"NCCL_HOSTID": f"host{rank // self._ranks_per_host}"} if self._ranks_per_host else {}
        return {"LOCAL_RANK": str(rank % torch.cuda.device_count()), **host, **caches}

    def _start(
        self, ranks: Sequence[int], environments: Sequence[Mapping[str, str]], *, forks: bool, preload: bool = False
    ) -> list[RankProcess]:
        """Forked from processes with DeepSpeed imported, or interpreters of their own; CUDA does not bear forks."""
        sources = self._fork_servers() if forks and self._backend == "gloo" else [None]
        return [
            RankProcess(self._new_path("rank"), self._backend, env, preload, sources[rank % len(sources)])
            for rank, env in zip(ranks, environments, strict=True)
        ]

    def _fork_servers(self) -> Sequence[ForkServer]:
        """Two, so that not all ranks iterate over sets of strings in one order."""
        for place, seed in enumerate(self._hash_seeds):
            if place == len(self._servers) or not self._servers[place].is_usable:
                environment = start_environment(self._backend, {"PYTHONHASHSEED": str(seed)})
                server = ForkServer(self._new_path("server"), environment)
                self._close(self._servers[place : place + 1])
                self._servers[place : place + 1] = [server]
        return self._servers

    @staticmethod
    def _close(servers: Sequence[ForkServer]) -> None:
        for server in servers:
            server.close()

    def _new_path(self, kind: str) -> Path:
        self._num_paths += 1
        return Path(self._folder.name) / f"{kind}{self._num_paths}"


def _converse_or_kill(
    processes: Sequence[RankProcess], calls: Sequence[Call], timeout: float, patient: bool
) -> list[RankOutcome]:
    try:
        return converse(processes, calls, timeout, patient)
    except BaseException:
        _kill(processes)
        raise


def _kill(processes: Sequence[RankProcess]) -> None:
    for process in processes:
        process.kill()
