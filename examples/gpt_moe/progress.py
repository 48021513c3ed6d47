"""The live line of rank 0: a rich bar on a terminal, a plain line every so many steps elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typing_extensions import Self

SMOOTHING = 0.9


@dataclass(frozen=True)
class LiveNumbers:
    """What one step showed on this rank; exposed_share is None where nobody measured it."""

    loss: float
    tokens_per_second: float
    exposed_share: float | None


class LiveProgress:
    """Show a run of total steps from first_step on; silent on every rank but the first."""

    def __init__(self, *, total: int, first_step: int, log_every: int, is_shown: bool) -> None:
        self._total, self._log_every, self._is_shown = total, max(1, log_every), is_shown
        self._loss: float | None = None
        self._started = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if is_shown and sys.stdout.isatty():
            self._bar = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("training", total=total, completed=first_step, numbers="starting")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, numbers: LiveNumbers) -> None:
        """Show the numbers after step (counted from 1); the loss is smoothed over about ten steps."""
        smooth = numbers.loss if self._loss is None else SMOOTHING * self._loss + (1 - SMOOTHING) * numbers.loss
        self._loss = smooth
        if not self._is_shown:
            return
        text = f"loss {smooth:.3f}  {numbers.tokens_per_second:,.0f} tokens/s"
        if numbers.exposed_share is not None:
            text += f"  exposed comm. {numbers.exposed_share:.0%}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=text)
        elif step % self._log_every == 0 or step == self._total:
            elapsed = time.monotonic() - self._started
            print(f"step {step:>5}/{self._total}  {text}  {elapsed:.0f} s", flush=True)
