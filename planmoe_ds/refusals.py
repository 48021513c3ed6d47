"""What happens to rows that a codec of fixed size cannot carry bit for bit: they travel again, as they are.

Only once results are encoded is it known whether they fit: sums are encoded on their way. So the ranks of a group ask
each other when a pass is over, and send all results again if one of them had to. Of gradients on their way out every
rank knows at once, but asking takes time, in which they travel already. Trying in vain costs time, so the next passes
do without the codec. (Tokens on their way out are asked about with the counts, which come before.)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch

PAUSE = 100  # passes

_told: set[str] = set()  # one line for all layers

logger = logging.getLogger("planmoe_ds")


class OnItsWay:
    """A tensor of one number on its way to the host, which may do something else meanwhile."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._arrived = None
        if number.device.type != "cpu":
            self._arrived = torch.get_device_module(number.device).Event()
            self._arrived.record()

    def value(self) -> int:
        """Waits for it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._number)


@dataclass
class Refusals:
    """One layer's memory of them, the same on every rank of its group."""

    layer: int
    speaks: bool  # this rank logs
    _paused: dict[str, int] = field(default_factory=dict, init=False)

    def may_try(self, what: str) -> bool:
        """Whether a codec that may refuse them may encode these rows of a pass that starts now."""
        left = self._paused.get(what, 0)
        if left > 0:
            self._paused[what] = left - 1
        return left == 0

    def add(self, what: str) -> None:
        """These rows were refused in a pass."""
        if self.speaks and what not in _told:
            _told.add(what)
            logger.warning(
                "planmoe: layer %d: %s did not fit a lossless codec and were sent again as they are; whenever this "
                "happens, %d passes of a layer do without it",
                self.layer, what, PAUSE,
            )  # fmt: skip
        self._paused[what] = PAUSE
