"""The pool of rank processes: results, failures, hangs, and nothing left over from one call to the next."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness.forks import ForkRequest, ForkServer, ForkServerError
from tests.harness.process import RankProcess
from tests.harness.ranks import RankError, RankOutcome, RankPool, RankTimeout

pytestmark = pytest.mark.distributed


def sum_of_ranks(offset: int) -> int:
    """Sum of (rank + offset) over all ranks."""
    value = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(value)
    return int(value)


def own_arguments(common: str, own: int, suffix: str = "") -> str:
    """Join what this rank was called with."""
    return f"{dist.get_rank()}:{common}:{own}:{suffix}"


def read_environment(names: list[str]) -> list[str | None]:
    """Values of environment variables on this rank."""
    return [os.environ.get(name) for name in names]


def process_state() -> dict[str, object]:
    """What a call may rely on finding."""
    return {
        "process": os.getpid(),
        "random": torch.rand(1).item(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deepspeed": "deepspeed" in sys.modules,
        "variable": os.environ.get("LEFT_BEHIND"),
        "system_threads": len(list(Path("/proc/self/task").iterdir())),
    }


def disturb_process() -> None:
    """Change everything `process_state` reports."""
    torch.manual_seed(99)
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.environ["LEFT_BEHIND"] = "yes"
    [dist.new_group(list(range(dist.get_world_size()))) for _ in range(4)]


def fail_on(rank: int, with_barrier: bool) -> int:
    """Raise on one rank; the others wait for it in a barrier or return."""
    if dist.get_rank() == rank:
        print("about to fail")
        raise LookupError(f"no expert on rank {rank}")
    if with_barrier:
        dist.barrier()
    return dist.get_rank()


def wait_in_barrier_except(absent: int) -> None:
    """Hang on every rank but one."""
    if dist.get_rank() != absent:
        print("entering the barrier")
        dist.barrier()


def kill_rank(rank: int) -> str:
    """End one rank as the out-of-memory killer would; the others notice at their next exchange."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return "unreachable"


def return_unpicklable() -> object:
    """A result that cannot travel."""
    return lambda: None


def leave_thread_behind() -> int:
    """Start a thread that outlives the call."""
    import threading

    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return os.getpid()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_by_rank(ranks: RankPool, world_size: int) -> None:
    expected = sum(range(10, 10 + world_size))
    assert ranks.run(world_size, sum_of_ranks, 10) == [expected] * world_size


def test_arguments_per_rank(ranks: RankPool) -> None:
    results = ranks.run(2, own_arguments, "all", per_rank_args=[(5,), (6,)], suffix="end")
    assert results == ["0:all:5:end", "1:all:6:end"]


def test_launcher_variables_and_env(ranks: RankPool) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "COLOUR", "MASTER_ADDR"]
    nodes = [{"LOCAL_WORLD_SIZE": "1", "COLOUR": str(rank), "LOCAL_RANK": "0"} for rank in range(2)]
    assert ranks.run(2, read_environment, names, env=nodes) == [
        ["0", "0", "2", "1", "0", "127.0.0.1"],
        ["1", "0", "2", "1", "1", "127.0.0.1"],
    ]
    assert ranks.run(2, read_environment, ["COLOUR"], env={"COLOUR": "red"}) == [["red"]] * 2
    assert ranks.run(2, read_environment, ["COLOUR"]) == [[None]] * 2


def test_next_call_finds_what_the_first_found(ranks: RankPool) -> None:
    before = ranks.run(2, process_state)
    ranks.run(2, disturb_process)
    assert ranks.run(2, process_state) == before


def test_processes_are_kept_unless_fresh(ranks: RankPool) -> None:
    kept, again = ranks.run(2, process_state), ranks.run(2, process_state)
    assert [state["process"] for state in kept] == [state["process"] for state in again]
    fresh, bare = ranks.run(2, process_state, fresh=True), ranks.run(2, process_state, bare=True)
    assert len({state["process"] for state in kept + fresh + bare}) == 6
    assert [state["deepspeed"] for state in kept + fresh + bare] == [True] * 4 + [False] * 2


def test_pools_that_make_room_end_each_others_processes(ranks: RankPool) -> None:
    kept = ranks.run(2, os.getpid)
    first, second = (RankPool(makes_room=True) for _ in range(2))
    processes = first.run(2, os.getpid)
    assert first.run(2, os.getpid) == processes
    assert second.run(1, os.getpid)[0] not in processes
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert first.run(2, sum_of_ranks, 0) == [1, 1]
    assert ranks.run(2, os.getpid) == kept
    first.close()
    second.close()


def hash_of_a_name() -> int:
    """What the order of a set of names follows."""
    return hash("expert")


@pytest.mark.parametrize("options", [{}, {"fresh": True}, {"bare": True}], ids=str)
def test_ranks_iterate_over_sets_in_orders_of_their_own(ranks: RankPool, options: dict[str, bool]) -> None:
    assert len(set(ranks.run(4, hash_of_a_name, **options))) > 1


def test_also_where_they_come_one_by_one() -> None:
    pool = RankPool()
    try:
        for size in (1, 2, 3):
            hashes = pool.run(size, hash_of_a_name)
        assert len(set(hashes)) == 2
    finally:
        pool.close()


def test_a_rank_can_be_killed_at_once(ranks: RankPool, tmp_path: Path) -> None:
    source = ranks._fork_servers()[0]
    for number in range(10):
        process = RankProcess(tmp_path / str(number), "gloo", {}, preload=False, source=source)
        begin = time.monotonic()
        process.kill()
        assert time.monotonic() - begin < 5
        assert not process.is_alive


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_fork_server_that_is_gone_is_replaced(how: str) -> None:
    pool = RankPool()
    try:
        kept = pool.run(2, process_state)
        server = pool._servers[0]
        if how == "killed":
            server._process.kill()
            server._process.wait()
        else:
            server._is_asked = True  # as an exception between question and answer leaves it
        with pytest.raises(ForkServerError, match="fork server of the rank processes"):
            server.exit_code(1)
        again = pool.run(2, process_state)
        assert kept[0]["process"] != again[0]["process"]
        assert kept[1]["process"] == again[1]["process"]
        assert server._process.poll() is not None
    finally:
        pool.close()


def test_a_fork_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = ForkServer(tmp_path / "output", {**os.environ, "PYTHONPATH": "", "DS_ACCELERATOR": "abacus"})
    with pytest.raises(ForkServerError, match=r"(?s)ended with exit code 1.*abacus"):
        server.fork(ForkRequest(tmp_path / "a", tmp_path / "b", "gloo", {}), 0)
    server.close()


def test_error_shows_every_failed_rank(ranks: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(4, fail_on, 2, with_barrier=False)
    message = str(caught.value)
    assert "fail_on failed on ranks [2] of 4" in message
    assert "in fail_on" in message
    assert "LookupError: no expert on rank 2" in message
    assert "about to fail" in message


def test_peers_of_a_failed_rank_do_not_use_up_the_timeout(ranks: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(2, fail_on, 1, with_barrier=True, timeout=60)
    assert time.monotonic() - start < 30
    assert [outcome.error for outcome in caught.value.outcomes] == ["StillRunning", "LookupError"]
    assert "in barrier" in str(caught.value)
    assert ranks.run(2, sum_of_ranks, 0) == [1, 1]


def test_expected_failure_returns_outcomes(ranks: RankPool) -> None:
    outcomes = ranks.run(2, fail_on, 1, with_barrier=False, expect_failure=True)
    assert outcomes[0].result == 0
    assert not outcomes[0].failed
    assert isinstance(outcomes[1], RankOutcome)
    assert (outcomes[1].error, outcomes[1].message) == ("LookupError", "no expert on rank 1")
    assert 0 <= outcomes[1].seconds < 30


def test_hang_names_ranks_and_where_they_are(ranks: RankPool) -> None:
    with pytest.raises(RankTimeout) as caught:
        ranks.run(3, wait_in_barrier_except, 1, timeout=4)
    assert caught.value.stuck == (0, 2)
    message = str(caught.value)
    assert "ranks [0, 2] of 3 did not return" in message
    assert "within 4 s; ranks [1] did" in message
    assert message.count("in wait_in_barrier_except") == 2
    assert message.count("entering the barrier") == 2
    assert ranks.run(3, sum_of_ranks, 0) == [3, 3, 3]


def test_killed_rank_is_an_outcome(ranks: RankPool) -> None:
    outcomes = ranks.run(2, kill_rank, 1, expect_failure=True)
    assert (outcomes[1].error, outcomes[1].message) == ("ProcessExit", "killed by SIGKILL")
    assert outcomes[0].failed
    assert ranks.run(2, sum_of_ranks, 0) == [1, 1]


def test_process_whose_group_did_not_begin_is_replaced(ranks: RankPool) -> None:
    assert ranks.run(1, sum_of_ranks, 0) == [0]
    (outcome,) = ranks.run(1, sum_of_ranks, 0, env={"GLOO_SOCKET_IFNAME": "nowhere"}, expect_failure=True)
    assert "nowhere" in outcome.message
    assert ranks.run(2, sum_of_ranks, 0, timeout=20) == [1, 1]


def test_result_that_cannot_travel_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="return_unpicklable"):
        ranks.run(1, return_unpicklable)


def test_process_with_a_leftover_thread_is_replaced(ranks: RankPool) -> None:
    first = ranks.run(1, leave_thread_behind)
    assert ranks.run(1, leave_thread_behind) != first


def test_bad_calls_are_refused(ranks: RankPool) -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        ranks.run(2, lambda: None)
    with pytest.raises(ValueError, match="world_size is 9, expected 1 to 8"):
        ranks.run(9, sum_of_ranks, 0)
    with pytest.raises(ValueError, match="per_rank_args has 1 entries, expected one per rank: 2"):
        ranks.run(2, sum_of_ranks, per_rank_args=[(0,)])
    with pytest.raises(ValueError, match="env has 3 entries, expected one mapping per rank: 2"):
        ranks.run(2, sum_of_ranks, 0, env=[{}, {}, {}])


def test_function_of_a_module_off_the_search_path(ranks: RankPool, tmp_path: Path) -> None:
    import importlib.util

    (tmp_path / "elsewhere.py").write_text("def answer():\n    return 42\n")
    specification = importlib.util.spec_from_file_location("elsewhere", tmp_path / "elsewhere.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["elsewhere"] = module
    specification.loader.exec_module(module)
    try:
        assert ranks.run(2, module.answer) == [42, 42]
    finally:
        del sys.modules["elsewhere"]


def test_module_that_cannot_be_imported_on_a_rank(ranks: RankPool) -> None:
    outcomes = ranks.run(2, _function_of_broken_module(), expect_failure=True)
    assert [outcome.error for outcome in outcomes] == ["FileNotFoundError", "FileNotFoundError"]


def _function_of_broken_module():  # type: ignore[no-untyped-def]
    from types import ModuleType

    module = ModuleType("nowhere_at_all")
    module.__file__ = "/nonexistent/nowhere_at_all.py"
    exec("def lost():\n    return 1\n", module.__dict__)  # noqa: S102 - a function whose file does not exist
    sys.modules[module.__name__] = module
    return module.lost
