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

ChunkRows = _C.ChunkRows
Clock = _C.Clock
Comm = _C.Comm
Compressor = _C.Compressor
Exchange = _C.Exchange
ExchangeSpec = _C.ExchangeSpec
Itinerary = _C.Itinerary
LaunchLedger = _C.LaunchLedger
RowRoutes = _C.RowRoutes
RowSums = _C.RowSums
Spread = _C.Spread
Stamp = _C.Stamp
TokenOrder = _C.TokenOrder
aligned = _C.aligned
build_info = _C.build_info
comm_names = _C.comm_names
compressor_names = _C.compressor_names
dot_rows = _C.dot_rows
find_experts = _C.find_experts
fold_rows = _C.fold_rows
make_comm = _C.make_comm
make_compressor = _C.make_compressor
order_tokens = _C.order_tokens
spread_rows = _C.spread_rows
unpack_add = _C.unpack_add

__all__ = [
    "ChunkRows",
    "Clock",
    "Comm",
    "Compressor",
    "Exchange",
    "ExchangeSpec",
    "Itinerary",
    "LaunchLedger",
    "RowRoutes",
    "RowSums",
    "Spread",
    "Stamp",
    "TokenOrder",
    "aligned",
    "build_info",
    "comm_names",
    "compressor_names",
    "dot_rows",
    "find_experts",
    "fold_rows",
    "make_comm",
    "make_compressor",
    "order_tokens",
    "spread_rows",
    "unpack_add",
]
