"""What a rank's MoE layers sent, waited for and computed: totals per step and, on request, every span."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from planmoe_ds.backend import Clock, Exchange, Stamp
from planmoe_ds.trace import Lane, Phase, Span

if TYPE_CHECKING:
    from planmoe_ds.group import ExpertGroup

MAX_PENDING = 1 << 14  # events kept unread: then the older half is added up
_Event = TypeVar("_Event")


@dataclass(frozen=True)
class StepStats:
    """Totals on this rank since the last take(): bytes, and seconds of the pass through the MoE layers.

    bytes_sent: to other ranks; stock_bytes: what the framework's padded all-to-alls would have sent;
    exposed_seconds: the compute lane waited for an exchange; communication_seconds: exchanges were in flight
    (summed over exchanges and links); expert_seconds: experts computed.
    """

    bytes_sent: int = 0
    stock_bytes: int = 0
    exposed_seconds: float = 0.0
    communication_seconds: float = 0.0
    expert_seconds: float = 0.0
    num_exchanges: int = 0


class Label(NamedTuple):
    """Where an event belongs."""

    name: str
    layer: int
    chunk: int
    phase: Phase

    def describe(self) -> str:
        """Words such as "layer 3 forward, dispatch of chunk 1"."""
        of_chunk = f" of chunk {self.chunk}" if self.chunk >= 0 else ""
        return f"layer {self.layer} {self.phase}, {self.name}{of_chunk}"


@dataclass(frozen=True)
class Quality:
    """A measured codec: ||decoded - x|| / ||x||, the largest of a group's ranks; `retreat`: what it gave way to, if so.

    step: training calls of the layer before the measured one; direction: "dispatch", "combine", "gradients"; link:
    "near", "far", "inner" (partial sums).
    """

    step: int
    layer: int
    direction: str
    link: str
    codec: str
    error: float
    retreat: str | None


class Recorder:
    """Collects events of one rank; thread-safe, because backward runs on autograd's thread."""

    def __init__(self, device: torch.device) -> None:
        self._clock = Clock(device)
        self._lock = threading.Lock()
        self._spans: deque[tuple[Label, Lane, Stamp, Stamp]] = deque()
        self._exchanges: deque[tuple[Label, Exchange]] = deque()
        self._seconds: dict[str, float] = defaultdict(float)  # by lane
        self._bytes_sent = 0
        self._stock_bytes = 0
        self._num_exchanges = 0
        self._trace: list[Span] | None = None
        self._loads: dict[int, torch.Tensor] = {}
        self._qualities: deque[Quality] = deque(maxlen=MAX_PENDING)

    @contextmanager
    def span(self, lane: Lane, label: Label) -> Iterator[None]:
        """Record the enclosed work on `lane` ("compute" or "wait")."""
        start = self._clock.stamp()
        yield
        self._keep_span(label, lane, start)

    def wait(self, exchange: Exchange, label: Label, group: ExpertGroup) -> None:
        """Wait for `exchange` of `group`, recording how long that took and when it ran."""
        start = self._clock.stamp()
        with group.waiting(exchange, label.describe()):
            exchange.wait()
        self._keep_span(label, "wait", start)
        with self._lock:
            self._exchanges.append((label, exchange))
            self._bytes_sent += exchange.bytes_sent
            self._num_exchanges += 1

    def add_load(self, layer: int, expert_KT: torch.Tensor, num_experts: int) -> None:
        """Count this rank's routes to every expert of a layer, negative ones left out, while a trace is on."""
        if self._trace is not None:
            counts = torch.bincount(expert_KT.flatten().long() + 1, minlength=num_experts + 1)[1:]
            with self._lock:
                self._loads[layer] = self._loads[layer] + counts if layer in self._loads else counts

    def take_loads(self) -> dict[int, list[int]]:
        """Routes to every expert since start_trace(), by layer."""
        with self._lock:
            found, self._loads = self._loads, {}
        return {layer: counts.tolist() for layer, counts in sorted(found.items())}

    def add_stock_bytes(self, count: int) -> None:
        """Add what the framework's own all-to-all would have sent."""
        with self._lock:
            self._stock_bytes += count

    def add_quality(self, quality: Quality) -> None:
        """Add what the quality guard found."""
        self._qualities.append(quality)

    def take_qualities(self) -> list[Quality]:
        """What the quality guard found since the last call."""
        found = list(self._qualities)
        self._qualities.clear()
        return found

    def take(self) -> StepStats:
        """Totals since the last call, then start from zero; on an accelerator this waits for the recorded work."""
        self._drain()
        with self._lock:
            seconds, self._seconds = self._seconds, defaultdict(float)
            stats = StepStats(
                bytes_sent=self._bytes_sent,
                stock_bytes=self._stock_bytes,
                exposed_seconds=seconds.pop("wait", 0.0),
                expert_seconds=seconds.pop("compute", 0.0),
                communication_seconds=sum(seconds.values(), 0.0),
                num_exchanges=self._num_exchanges,
            )
            self._bytes_sent = self._stock_bytes = self._num_exchanges = 0
        return stats

    def start_trace(self) -> None:
        """Keep every span from now on, until stop_trace()."""
        self._drain()
        self._trace = []
        self._loads = {}

    def stop_trace(self) -> list[Span]:
        """The spans since start_trace(), in order of their start; empty when no trace was started."""
        self._drain()
        trace, self._trace = self._trace, None
        return sorted(trace if trace is not None else [], key=lambda span: span.start_ns)

    def _keep_span(self, label: Label, lane: Lane, start: Stamp) -> None:
        self._spans.append((label, lane, start, self._clock.stamp()))
        if len(self._spans) >= MAX_PENDING:
            self._drain(MAX_PENDING // 2)

    def _drain(self, spared: int = 0) -> None:
        """Add up pending events but about the last `spared`, which a device may not have got to; a trace keeps them."""
        with self._lock:
            share = max(0.0, 1 - spared / max(1, len(self._spans)))
            pending, exchanges = _popped(self._spans, share), _popped(self._exchanges, share)
        spans = [_span(label, lane, start.ns(), end.ns()) for label, lane, start, end in pending]
        for label, exchange in exchanges:
            spans += [_span(label, lane, start, end) for lane, start, end in exchange.spans()]
        with self._lock:
            for span in spans:
                self._seconds[span.lane] += (span.end_ns - span.start_ns) * 1e-9
            if self._trace is not None:
                self._trace += spans


def _popped(events: deque[_Event], share: float) -> list[_Event]:
    """The oldest events, taken out."""
    return [events.popleft() for _ in range(round(share * len(events)))]


def _span(label: Label, lane: Lane, start_ns: int, end_ns: int) -> Span:
    return Span(label.name, lane, label.layer, label.chunk, label.phase, start_ns, end_ns)
