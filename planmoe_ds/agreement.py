"""At start, before anything can hang: every rank must have been told the same."""

from __future__ import annotations

import json
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from planmoe_ds.errors import PlanMoEError, PlanMoEMismatchError
from planmoe_ds.job_store import job_store, job_timeout

PREFIX = "agreement"
PATIENCE = timedelta(minutes=10)  # how far apart ranks may reach the start; at most half the process group's timeout
OFF_PATIENCE = timedelta(seconds=15)  # the same for a rank where planmoe is off: the others may never ask
UNHEARD = "planmoe is off on rank 0, which did not wait for "
ENABLED = "planmoe.enabled"
FAILED = "failed"


def check_agreement(settings: dict[str, str]) -> None:
    """Compare `settings` (key -> value) with every other rank's, through the job's key-value store.

    A key is compared among the ranks that have it. Rank 0 reads all and publishes the verdict, so the cost is linear
    in the number of ranks. A rank with the key FAILED tells the others why it is about to stop.
    Raises PlanMoEMismatchError, the same on every rank, naming the keys and who has which value.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        return
    store = PrefixStore(PREFIX, job_store())
    call = store.add(f"calls/{rank}", 1)  # several engines in one job: each has a round of its own
    store.set(f"{call}/{rank}", json.dumps(settings))
    is_off = settings.get(ENABLED) == "False"
    patience = min(OFF_PATIENCE if is_off else PATIENCE, job_timeout() / 2)
    if rank == 0:
        store.set(f"{call}/verdict", _judge(store, call, world_size, patience))
    try:
        verdict = store.get(f"{call}/verdict").decode() if _await(store, f"{call}/verdict", patience * 2) else None
    except RuntimeError as error:
        raise PlanMoEError(f"rank {rank} lost the job's store while comparing settings: {error}") from error
    if is_off and (verdict is None or verdict.startswith(UNHEARD)):
        return
    if verdict is None:
        raise PlanMoEMismatchError(f"rank 0 did not compare the ranks' settings within {patience * 2}")
    if verdict:
        raise PlanMoEMismatchError(verdict)


def _await(store: Store, key: str, patience: timedelta) -> bool:
    try:
        store.wait([key], patience)
    except (dist.DistStoreError, dist.DistNetworkError, RuntimeError):
        return bool(store.check([key]))
    return True


def _judge(store: Store, call: int, world_size: int, patience: timedelta) -> str:
    """The verdict: empty when all agree."""
    settings: dict[int, dict[str, str]] = {}
    for rank in range(world_size):
        if _await(store, f"{call}/{rank}", patience if len(settings) == rank else timedelta(seconds=1)):
            settings[rank] = json.loads(store.get(f"{call}/{rank}"))
    unheard = [rank for rank in range(world_size) if rank not in settings]
    problem = judge(settings, world_size)
    return f"{UNHEARD}ranks {unheard}" if unheard and not problem else problem


def judge(settings: dict[int, dict[str, str]], world_size: int) -> str:
    """Compare what ranks reported (rank -> key -> value); returns what is wrong, or an empty string."""
    failed = {rank: values[FAILED] for rank, values in settings.items() if FAILED in values}
    if failed:
        return "; ".join(f"rank {rank} stopped at start: {reason}" for rank, reason in failed.items())
    missing = [rank for rank in range(world_size) if rank not in settings]
    if missing and any(values.get(ENABLED) == "True" for values in settings.values()):
        return f"planmoe is on, but ranks {missing} did not report their settings: is planmoe_ds imported there?"
    problems = []
    for key in sorted({key for values in settings.values() for key in values}):
        holders: dict[str, list[int]] = {}
        for rank, values in settings.items():
            if key in values:
                holders.setdefault(values[key], []).append(rank)
        if len(holders) > 1:
            shares = "; ".join(f"{value} on ranks {ranks}" for value, ranks in holders.items())
            problems.append(f"ranks disagree on {key}: {shares}")
    return "\n".join(problems)
