"""The quality guard: what lossy codecs do to the tensors that travel, and the retreat to finer ones.

In every `interval`-th training step a layer decodes what it encodes and compares, for every direction and kind of link.
The errors travel with the counts of the layer's next call, so all ranks of the expert-parallel group learn the largest
of them at the same time, and switch to finer codecs in the same step. There is no way back to a coarser codec.

Ways: (direction, link), with the links of LinkCodecs.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from planmoe_ds.backend import Compressor, make_compressor
from planmoe_ds.codecs import Codecs, LinkCodecs
from planmoe_ds.compression import DIRECTIONS, NONE, CompressionConfig, GuardConfig
from planmoe_ds.recorder import Quality, Recorder

LINKS = ("near", "far", "inner")
LINK_WORDS = {"near": "inside the node", "far": "between nodes", "inner": "of partial sums"}
WAYS = tuple((direction, link) for direction in DIRECTIONS for link in LINKS)
_HALF_RATE = 16.0  # of zfp: as many bits as 16-bit rows have

logger = logging.getLogger("planmoe_ds")


def finer(name: str, dtype: torch.dtype) -> str:
    """The codec to try after `name` for rows of `dtype`, always of smaller error on any data; in the end "none"."""
    half = "bf16" if dtype is torch.float32 else NONE
    if name in ("int4", "fp8", "int8"):
        return "hadamard_int8"
    if name == "hadamard_int8":
        return half
    base, _, rate = name.partition(":")
    if base == "zfp" and (float(rate) if rate else 8.0) < _HALF_RATE and dtype is torch.float32:
        return f"zfp:{_HALF_RATE:g}"
    return NONE


class Meter:
    """Sums of squares of one measured call: by way, of the error and of the rows."""

    def __init__(self) -> None:
        self._squares: dict[tuple[str, str], torch.Tensor] = {}

    def measure(self, way: tuple[str, str], codec: Compressor, rows: torch.Tensor) -> None:
        """Add what `codec` does to rows [R, H]; rows with a NaN or an infinity count for nothing."""
        if codec.lossless or rows.shape[0] == 0:
            return
        rows = rows.contiguous()
        decoded = torch.empty_like(rows)
        codec.decode(codec.encode(rows), decoded)
        finite_R1 = torch.isfinite(rows).all(1, keepdim=True)
        exact, error = (
            torch.where(finite_R1, values.double(), 0.0).square().sum() for values in (rows, decoded.double() - rows)
        )
        found = torch.stack([error, exact])
        self._squares[way] = self._squares[way] + found if way in self._squares else found

    def take(self) -> dict[tuple[str, str], float]:
        """The relative errors since the last call."""
        squares, self._squares = self._squares, {}
        errors = {}
        for way, sums in squares.items():
            error, exact = sums.tolist()
            if exact > 0:
                errors[way] = math.inf if math.isnan(error) else math.sqrt(error / exact)
        return errors


@dataclass
class QualityGuard:
    """One layer's guard; the same on every rank of its group. The state it keeps: which codecs are in force."""

    config: GuardConfig
    compression: CompressionConfig
    layer: int
    recorder: Recorder
    _names: dict[tuple[str, str], str] = field(init=False)
    _steps: int = field(default=0, init=False)
    _measured_step: int = field(default=0, init=False)
    _meter: Meter = field(default_factory=Meter, init=False)
    _codecs: Codecs = field(init=False)

    def __post_init__(self) -> None:
        self._names = {}
        for direction in DIRECTIONS:
            links = self.compression.links(direction)
            sums = NONE if direction == "dispatch" else self.compression.sums
            for link, name in zip(LINKS, (links.intra, links.inter, sums), strict=True):
                self._names[direction, link] = name
        self._codecs = self._make()

    @property
    def codecs(self) -> Codecs:
        """In force."""
        return self._codecs

    def notes(self) -> list[int]:
        """What this rank measured since the last call, for the other ranks: one integer per way, larger for larger."""
        errors = self._meter.take()
        return [_as_integer(errors.get(way, 0.0)) for way in WAYS]

    def follow(self, notes: Sequence[int], dtype: torch.dtype, speaks: bool) -> Codecs:
        """Act on the largest notes of all ranks: the codecs from now on. `speaks`: this rank logs."""
        retreated = False
        for way, note in zip(WAYS, notes, strict=True):
            if note == 0:
                continue
            error, name = _as_float(note), self._names[way]
            retreat = finer(name, dtype) if error > self.config.max_error else None
            self.recorder.add_quality(Quality(self._measured_step, self.layer, *way, name, error, retreat))
            if speaks:
                self._log(way, name, error, retreat)
            if retreat is not None:
                self._names[way] = retreat
                retreated = True
        if retreated:
            self._codecs = self._make()
        return self._codecs

    def next_step(self) -> Meter | None:
        """Count a training step; the meter to give its call if it is to be measured."""
        due = self._steps % self.config.interval == 0
        self._steps += 1
        if not due:
            return None
        self._measured_step = self._steps - 1
        return self._meter

    def _make(self) -> Codecs:
        return Codecs(
            **{
                direction: LinkCodecs(*(make_compressor(self._names[direction, link]) for link in LINKS))
                for direction in DIRECTIONS
            }
        )

    def _log(self, way: tuple[str, str], name: str, error: float, retreat: str | None) -> None:
        direction, link = way
        found = (
            f"planmoe: step {self._measured_step}, layer {self.layer}: {direction} {LINK_WORDS[link]}, {name}: "
            f"relative error {error:.3g}"
        )
        if retreat is None:
            logger.info(found)
        else:
            logger.warning("%s is above %g: from now on %s", found, self.config.max_error, retreat)


def _as_integer(error: float) -> int:
    """The bits of a float64, which sort as the number does when it is not negative."""
    bits: int = struct.unpack("<q", struct.pack("<d", error))[0]
    return bits


def _as_float(bits: int) -> float:
    error: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return error
