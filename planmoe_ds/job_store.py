"""The job's own key-value store, as planmoe uses it."""

from __future__ import annotations

import os

from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store


def job_store() -> Store:
    """Keys of planmoe's own, for this attempt alone.

    torchrun keeps one store over its restarts: what ranks of an earlier attempt told must not be found.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"planmoe/attempt {attempt}", _get_default_store())
