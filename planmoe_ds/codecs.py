"""The compressors in use, by direction and kind of link.

There is no error feedback, on purpose. Adding what a codec lost to the next thing sent is sound where the same quantity
is sent again and only its sum over time matters, such as a parameter's gradient to its optimizer. Here a row is a token
(or its gradient, or a sum of its experts' outputs): in the next step other tokens stand at its place, or the same one
goes to other experts on other ranks, so what was lost belongs to nothing that follows, and would be noise there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from planmoe_ds.backend import Compressor, make_compressor
from planmoe_ds.compression import DIRECTIONS, NONE, CompressionConfig


@dataclass(frozen=True)
class LinkCodecs:
    """The compressor of each kind of link, for one direction.

    near: to the ranks of this node; far: between nodes; inner: sums on their way to the rank that adds up its node's
    before they go on.
    """

    near: Compressor
    far: Compressor
    inner: Compressor

    @classmethod
    def everywhere(cls, name: str) -> LinkCodecs:
        """One codec for both kinds of links; what is summed up on the way is encoded once, where it is complete."""
        codec = make_compressor(name)
        return cls(codec, codec, make_compressor(NONE))

    @property
    def may_refuse(self) -> bool:
        """Whether there are rows that one of them cannot carry."""
        return bool(self._refusing)

    def for_rows(self, dtype: torch.dtype) -> LinkCodecs:
        """These; none where one that may refuse rows takes none of `dtype`."""
        return self if all(codec.carries(dtype) for codec in self._refusing) else LinkCodecs.everywhere(NONE)

    def misfits(self, rows: torch.Tensor) -> torch.Tensor:
        """int32 [1] on the rows' device, not zero where one of `rows` [R, H] cannot be carried; needs `may_refuse`."""
        return torch.stack([codec.misfits(rows) for codec in self._refusing]).amax(0)

    def take_refused(self) -> bool:
        """Whether a row that was encoded since the last call could not be carried; waits for encoders."""
        refused = [codec.take_refused() for codec in self._refusing]  # every one starts anew
        return any(refused)

    @cached_property
    def _refusing(self) -> list[Compressor]:
        return [codec for codec in (self.near, self.far, self.inner) if codec.may_refuse]


@dataclass(frozen=True)
class Codecs:
    """The compressors of each direction."""

    dispatch: LinkCodecs
    combine: LinkCodecs
    gradients: LinkCodecs

    def with_raw_tokens(self) -> Codecs:
        """The same for tokens that the codecs cannot carry."""
        return replace(self, dispatch=LinkCodecs.everywhere(NONE))


def make_codecs(compression: CompressionConfig) -> Codecs:
    """The compressors that the config names."""
    made = {}
    for direction in DIRECTIONS:
        links = compression.links(direction)
        sums = NONE if direction == "dispatch" else compression.sums  # tokens are not summed up
        made[direction] = LinkCodecs(*(make_compressor(name) for name in (links.intra, links.inter, sums)))
    return Codecs(**made)
