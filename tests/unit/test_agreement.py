"""What the ranks' settings are judged to be: equal, different and how, or missing."""

from __future__ import annotations

import time
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch.distributed as dist

import planmoe_ds.agreement as agreement_module
import planmoe_ds.connect as connect_module
import planmoe_ds.job_store as job_store_module
from planmoe_ds.agreement import check_agreement, judge
from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.job_store import job_store, job_timeout
from tests.engine.support import make_layer
from tests.harness.ranks import RankPool

ON = {"planmoe.enabled": "True", "planmoe.chunks": "2"}


def test_equal_settings() -> None:
    assert judge({0: ON, 1: dict(ON)}, 2) == ""


def test_the_key_the_values_and_the_ranks_are_named() -> None:
    settings = {0: ON, 1: {**ON, "planmoe.chunks": "4"}, 2: ON}
    assert judge(settings, 3) == "ranks disagree on planmoe.chunks: 2 on ranks [0, 2]; 4 on ranks [1]"


def test_every_key_that_differs_is_named() -> None:
    problem = judge({0: ON, 1: {"planmoe.enabled": "True", "planmoe.chunks": "3"}, 2: {"planmoe.enabled": "False"}}, 3)
    assert "planmoe.chunks: 2 on ranks [0]; 3 on ranks [1]" in problem
    assert "planmoe.enabled: True on ranks [0, 1]; False on ranks [2]" in problem


def test_a_key_that_only_some_ranks_have_is_compared_among_them() -> None:
    assert judge({0: {**ON, "MoE layer 0 of expert-parallel ranks [0]": "a"}, 1: ON}, 2) == ""


def test_a_silent_rank_matters_only_when_planmoe_is_on() -> None:
    assert "ranks [1] did not report" in judge({0: ON}, 2)
    assert judge({0: {"planmoe.enabled": "False"}}, 2) == ""


def test_a_rank_that_failed_is_named_with_its_reason() -> None:
    assert judge({0: ON, 1: {"failed": "chunks = 0"}}, 2) == "rank 1 stopped at start: chunks = 0"


def test_every_restart_has_keys_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = dist.HashStore()  # as torchrun keeps over restarts
    monkeypatch.setattr(job_store_module, "_get_default_store", lambda: shared)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    job_store().set("failed", "an earlier attempt")
    assert job_store().check(["failed"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not job_store().check(["failed"])


def start_late() -> float:
    """Seconds that a rank waits, one of which starts when the other has given it up."""
    dist.barrier()
    time.sleep(7 * dist.get_rank())
    start = time.monotonic()
    with (
        patch.object(agreement_module, "job_timeout", lambda: timedelta(seconds=6)),
        pytest.raises(PlanMoEMismatchError, match=r"ranks \[1\] did not report their settings"),
    ):
        check_agreement(ON)
    return time.monotonic() - start


@pytest.mark.distributed
def test_half_the_process_groups_timeout_is_waited_for_a_late_rank(ranks: RankPool) -> None:
    waited, late = ranks.run(2, start_late, fresh=True)
    assert 2.9 < waited < 5.9  # a FileStore counts whole seconds
    assert late < 1.9


def timeouts(settings: dict[str, object]) -> list[float]:
    """Seconds that the job's own group waits, then planmoe's groups in a job whose group waits 77 s."""
    with patch.object(connect_module, "job_timeout", lambda: timedelta(seconds=77)):
        layer = make_layer(settings)
    backends = [group._get_backend(group._device_types[0]) for group in layer.group.comm.groups]
    return [job_timeout().total_seconds(), *(backend.options._timeout.total_seconds() for backend in backends)]


@pytest.mark.distributed
def test_planmoes_groups_wait_as_long_as_the_jobs_own_or_as_the_config_says(ranks: RankPool) -> None:
    assert ranks.run(2, timeouts, {}) == [[1800, 77]] * 2
    assert ranks.run(2, timeouts, {"comm": "pipe"}) == [[1800, 77, 77]] * 2
    assert ranks.run(2, timeouts, {"comm": "dedup", "timeout_seconds": 5}) == [[1800, 5, 5, 5]] * 2
