"""The job's own key-value store, as planmoe uses it."""

from __future__ import annotations

import contextlib
import os
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

_GLOO = timedelta(minutes=30)  # torch's for gloo


def job_store() -> Store:
    """Keys of planmoe's own, for this attempt alone.

    torchrun keeps one store over its restarts: what ranks of an earlier attempt told must not be found.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"planmoe/attempt {attempt}", _get_default_store())


def job_number() -> int:
    """One that whichever rank asks first chooses at random: positive, of 56 bits, the same on every rank of the job."""
    return int(job_store().compare_set("number", "", uuid.uuid4().hex[:14]), 16)


def job_timeout() -> timedelta:
    """How long the job's own process group waits: the longest of its backends' times."""
    group = dist.group.WORLD
    assert group is not None
    found = []
    for device in group._device_types:
        with contextlib.suppress(AttributeError, RuntimeError):  # a backend without options
            found.append(group._get_backend(device).options._timeout)
    return max(found, default=_GLOO)
