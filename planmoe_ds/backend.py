"""The compiled backend, loaded once, with an error that says how to build it."""

from __future__ import annotations

import torch  # noqa: F401  the extension needs torch's libraries in the process

try:
    from planmoe_ds import _C
except ImportError as error:
    raise ImportError(
        f"planmoe_ds._C, the compiled backend, cannot be loaded ({error}). Build it against the torch in use: "
        "`pip install --no-build-isolation -e .` in the planmoe_ds checkout; `planmoe doctor` checks the rest."
    ) from error

Clock = _C.Clock
Comm = _C.Comm
Compressor = _C.Compressor
Exchange = _C.Exchange
Stamp = _C.Stamp
build_info = _C.build_info
comm_names = _C.comm_names
compressor_names = _C.compressor_names
make_comm = _C.make_comm
make_compressor = _C.make_compressor

__all__ = [
    "Clock",
    "Comm",
    "Compressor",
    "Exchange",
    "Stamp",
    "build_info",
    "comm_names",
    "compressor_names",
    "make_comm",
    "make_compressor",
]
