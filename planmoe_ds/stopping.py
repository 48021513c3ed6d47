"""How a rank stops: one reason, and the end of everything that it waits for."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planmoe_ds.backend import Comm
from planmoe_ds.errors import PlanMoEError, PlanMoEMismatchError


@dataclass(frozen=True)
class Reason:
    """Why everybody stops; `kind` is "mismatch" or "error"."""

    rank: int
    kind: str
    text: str

    def error(self) -> PlanMoEError:
        """As every rank raises it."""
        return (PlanMoEMismatchError if self.kind == "mismatch" else PlanMoEError)(self.text)


def end_waits(comms: Sequence[Comm], rank: int, reason: Reason, last_waits: Sequence[str]) -> None:
    """Abort all exchanges, and print why and, oldest first, what the rank waited for last.

    All at once: what one all-to-all frees on a device can wait for what another one still runs there, and a log can
    block.
    """
    lines = [f"planmoe: rank {rank} stops: {reason.text}", "its last waits, oldest first:", *last_waits]
    printing = _start(_print_if_possible, "\n  ".join(lines))
    for abort in [_start(comm.abort, f"planmoe: {reason.text}") for comm in comms]:
        if abort is not None:
            abort.join()
    if printing is not None:
        printing.join(timeout=1)


def _start(action: Callable[[str], None], text: str) -> threading.Thread | None:
    """Run action(text) in a thread of its own, or at once where the interpreter is about to end and starts none."""
    thread = threading.Thread(target=action, args=(text,), name="planmoe-stop", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        action(text)
        return None
    return thread


def _print_if_possible(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe
        print(text, file=sys.stderr, flush=True)
