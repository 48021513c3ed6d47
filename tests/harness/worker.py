"""One rank process: runs the test process's calls inside process groups and cleans up after each."""

from __future__ import annotations

import faulthandler
import functools
import gc
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tests.harness import state
from tests.harness.wire import Call, RankOutcome, find_function, pack

_PARENT_POLL_SECONDS = 1.0


def main(descriptor: int, stack_file: str, backend: str, preload: bool) -> None:
    """An interpreter of its own: serve()."""
    serve(Connection(descriptor), stack_file, backend, preload=preload)


def serve(connection: Connection, stack_file: str, backend: str, *, preload: bool = False) -> None:
    """Serve calls arriving on the pipe until the test process closes it."""
    stacks = Path(stack_file).open("w")  # noqa: SIM115 - the signal handler writes to it until exit
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), name="parent-watch", daemon=True).start()
    if preload:
        state.preload_deepspeed()
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        _serve(connection, call, backend)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent != 1:
        time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


def _serve(connection: Connection, call: Call, backend: str) -> None:
    """Answer one call: 'ready' or a failure, on 'go' the outcome, on 'close' whether all is clean."""
    environment, num_threads = dict(os.environ), threading.active_count()
    sys.path.extend(entry for entry in call.search_path if entry not in sys.path)
    os.environ.update(call.environment)
    state.reset_torch()
    snapshot = state.snapshot_deepspeed()
    task = _load(call)
    state.freeze_modules()
    state.skip_deepspeed_compilation()
    if isinstance(task, RankOutcome):
        connection.send(task)
        connection.recv()
    else:
        connection.send("ready")
        if connection.recv() == "go":
            connection.send_bytes(_run(call, backend, task))
            connection.recv()
    del task  # what the call made must be gone when its groups are destroyed
    connection.send(_clean_up(snapshot, environment, num_threads))


def _load(call: Call) -> Callable[[], Any] | RankOutcome:
    """Import the function and read its arguments; an outcome when that fails."""
    start = time.monotonic()
    try:
        function = find_function(call.function)
        args, kwargs = pickle.loads(call.arguments)  # noqa: S301 - from the test process
        return functools.partial(function, *args, **kwargs)
    except BaseException as error:  # noqa: BLE001 - whatever the module raises is the test's to see
        return _failure(call.rank, error, start)


def _run(call: Call, backend: str, task: Callable[[], Any]) -> bytes:
    """Create the process group, run the task and return the pickled outcome."""
    start = time.monotonic()
    try:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{call.store_file}", rank=call.rank, world_size=call.world_size
        )
        result = task()
        return pack(RankOutcome(call.rank, result, seconds=time.monotonic() - start))
    except BaseException as error:  # noqa: BLE001 - the test decides what a failure of this rank means
        return pack(_failure(call.rank, error, start))


def _failure(rank: int, error: BaseException, start: float) -> RankOutcome:
    return RankOutcome(
        rank,
        error=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        seconds=time.monotonic() - start,
    )


def _clean_up(snapshot: state.Snapshot, environment: dict[str, str], num_threads: int) -> bool:
    """Undo what the call did to this process; False when part of it is left, so it must not be used again."""
    try:
        state.destroy_models()
        gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        state.restore_deepspeed(snapshot)
        state.restore_environment(environment)
        gc.collect()
    except Exception:  # noqa: BLE001 - any trouble here retires the process
        traceback.print_exc()
        return False
    failed_to_begin = torch.distributed.distributed_c10d._world.group_count > 0  # and counts on, unlike a new process
    return not failed_to_begin and threading.active_count() <= num_threads
