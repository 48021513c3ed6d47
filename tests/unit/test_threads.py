"""Scheduling policy of the threads that carry exchanges."""

from __future__ import annotations

import os
import threading

import pytest

from planmoe_ds.threads import batch_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="SCHED_BATCH is Linux's")


def policy_of_a_new_thread() -> int:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(os.sched_getscheduler(0)))
    thread.start()
    thread.join()
    return seen[0]


def test_threads_started_inside_keep_the_policy_and_the_caller_does_not() -> None:
    with batch_threads():
        assert policy_of_a_new_thread() == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert policy_of_a_new_thread() == os.SCHED_OTHER


def test_the_policy_returns_after_an_error() -> None:
    with pytest.raises(KeyError), batch_threads():
        raise KeyError
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_a_chosen_policy_stays() -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        with batch_threads():
            assert os.sched_getscheduler(0) == os.SCHED_BATCH
        assert os.sched_getscheduler(0) == os.SCHED_BATCH
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
