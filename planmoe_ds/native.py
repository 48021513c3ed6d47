"""The compiled module, loaded once, with an error that says how to build it."""

from __future__ import annotations

import torch  # noqa: F401  the extension needs torch's libraries in the process

try:
    from planmoe_ds import _C
except ImportError as error:
    raise ImportError(
        f"planmoe_ds._C, the compiled backend, cannot be loaded ({error}). Build it against the torch in use: "
        "`pip install --no-build-isolation -e .` in the planmoe_ds checkout; `planmoe doctor` checks the rest."
    ) from error

__all__ = ["_C"]
