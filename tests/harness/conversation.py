"""The course of one call on all ranks at once: load, go, collect the outcomes, close."""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection as pipes
from typing import Any

from tests.harness.process import RankProcess
from tests.harness.wire import Call, RankOutcome

_LOAD_SECONDS = 240.0
_GRACE_SECONDS = 3.0
_CLOSE_SECONDS = 20.0

Everyone = Mapping[int, RankProcess]


class RankError(AssertionError):
    """The function raised, or its process ended, on some ranks; `outcomes` holds those ranks' outcomes."""

    def __init__(self, message: str, outcomes: Sequence[RankOutcome] = ()) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)


class RankTimeout(RankError):  # noqa: N818 - reads as what happened
    """Some ranks did not return in time; `stuck` lists them, the message holds their Python stacks.

    `outcomes` holds those of the others, failed or not.
    """

    def __init__(self, message: str, stuck: Sequence[int], outcomes: Sequence[RankOutcome] = ()) -> None:
        super().__init__(message, outcomes)
        self.stuck = tuple(stuck)


def converse(
    processes: Sequence[RankProcess], calls: Sequence[Call], timeout: float, patient: bool
) -> list[RankOutcome]:
    """Run the calls and return one outcome per rank; processes unfit for another call have been killed.

    Once a rank has failed the others get 3 more seconds and then count as failed; when `patient` they get all
    of `timeout` seconds. Raises `RankTimeout` when ranks are stuck without a failure, or although `patient`.
    """
    everyone = dict(enumerate(processes))
    for rank, process in everyone.items():
        process.mark_call()
        _send(process, calls[rank])
    replies = _collect(everyone, _LOAD_SECONDS, patient=True)
    _raise_if_stuck(everyone, replies, f"import the module of {_name(calls)} within {_LOAD_SECONDS:g} s")
    if all(reply == "ready" for reply in replies.values()):
        for process in processes:
            _send(process, "go")
        replies = _collect(everyone, timeout, patient)
    has_failure = any(isinstance(reply, RankOutcome) and reply.failed for reply in replies.values())
    if patient or not has_failure:
        _raise_if_stuck(everyone, replies, f"return from {_name(calls)} within {timeout:g} s")
    outcomes = [_outcome(rank, process, replies.get(rank)) for rank, process in everyone.items()]
    _close({rank: process for rank, process in everyone.items() if process.is_alive})
    return outcomes


def describe(name: str, outcomes: Sequence[RankOutcome], processes: Sequence[RankProcess]) -> str:
    """Say what happened on each failed rank: its traceback, then the end of what it printed."""
    failed = [outcome for outcome in outcomes if outcome.failed]
    lines = [f"{name} failed on ranks {[outcome.rank for outcome in failed]} of {len(outcomes)}"]
    for outcome in failed:
        heading = f"--- rank {outcome.rank}, after {outcome.seconds:.1f} s: {outcome.error}: {outcome.message}"
        lines += [heading, outcome.traceback.rstrip(), *_printed(outcome.rank, processes[outcome.rank])]
    return "\n".join(lines)


def _printed(rank: int, process: RankProcess) -> list[str]:
    output = process.output().rstrip()
    return [f"--- rank {rank} printed\n{output}"] if output else []


def _name(calls: Sequence[Call]) -> str:
    return f"{calls[0].function.module}.{calls[0].function.qualified_name}"


def _send(process: RankProcess, message: object) -> None:
    # That the process has ended shows when its reply is collected.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.connection.send(message)


def _collect(everyone: Everyone, seconds: float, patient: bool) -> dict[int, Any]:
    """Wait up to `seconds` for one reply of every rank; ranks that did not reply are not in the result."""
    replies: dict[int, Any] = {}
    deadline = time.monotonic() + seconds
    while len(replies) < len(everyone):
        waiting = {everyone[rank].connection: rank for rank in everyone if rank not in replies}
        ready = pipes.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting[connection]  # type: ignore[index]
            replies[rank] = _receive(rank, everyone[rank])
            if not patient and isinstance(replies[rank], RankOutcome) and replies[rank].failed:
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return replies


def _receive(rank: int, process: RankProcess) -> Any:
    try:
        message = process.connection.recv_bytes()
    except (EOFError, ConnectionResetError):
        return RankOutcome(rank, error="ProcessExit", message=process.exit_reason())
    return pickle.loads(message)  # noqa: S301 - from our own child


def _outcome(rank: int, process: RankProcess, reply: object) -> RankOutcome:
    if isinstance(reply, RankOutcome):
        return reply
    if reply == "ready":
        return RankOutcome(rank, error="NotStarted", message="a peer could not import the function")
    stacks = process.stacks()
    process.kill()
    message = f"{_GRACE_SECONDS:g} s after a peer failed"
    return RankOutcome(rank, error="StillRunning", message=message, traceback=stacks)


def _raise_if_stuck(everyone: Everyone, replies: Mapping[int, Any], task: str) -> None:
    stuck = [rank for rank in everyone if rank not in replies]
    if not stuck:
        return
    returned = [rank for rank in everyone if rank in replies]
    lines = [f"ranks {stuck} of {len(everyone)} did not {task}; ranks {returned} did"]
    for rank, reply in sorted(replies.items()):
        if isinstance(reply, RankOutcome) and reply.failed:
            lines.append(f"--- rank {rank} failed\n{reply.traceback or reply.message}")
    for rank in stuck:
        stacks = everyone[rank].stacks() or "(the process did not answer the request for its stacks)"
        lines += [f"--- rank {rank} is here\n{stacks.rstrip()}", *_printed(rank, everyone[rank])]
    outcomes = [reply for _, reply in sorted(replies.items()) if isinstance(reply, RankOutcome)]
    raise RankTimeout("\n".join(lines), stuck, outcomes)


def _close(everyone: Everyone) -> None:
    """Let every rank clean up, and kill those that cannot."""
    for process in everyone.values():
        _send(process, "close")
    replies = _collect(everyone, _CLOSE_SECONDS, patient=True)
    for rank, process in everyone.items():
        if replies.get(rank) is not True:
            process.kill()
