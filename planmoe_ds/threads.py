"""The scheduling policy of the threads that carry exchanges between CPU ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def batch_threads() -> Iterator[None]:
    """Threads started inside, by gloo groups and CPU links, do not interrupt a running thread when they wake up.

    gloo's event loop spins while another thread is posting to the same peer. Where ranks outnumber cores, the arrival
    of a message can put that loop in the place of the very thread it then waits for, until its time slice is over:
    milliseconds. Linux's SCHED_BATCH prevents it and leaves the share of processor time as it is. The calling thread's
    own policy is as before afterwards; a policy other than the default one is somebody's choice and stays.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
