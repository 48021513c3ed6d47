"""The compression "auto": a codec on the classes of links where it is predicted to save time, from measured costs.

The first candidate is hadamard_int8: of the codecs with about a quarter of float32's bytes the one whose error hardly
depends on the data; but it fills rows up to blocks of 128 values, so that int8 can be much smaller. Where no bit may
change it is lossless alone, for bfloat16. A prediction is one dispatch, as in choose.py, plus encoding what a rank
sends and decoding what it gets, and a share of what it takes to agree that nothing was refused.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as dist

from planmoe_ds.backend import make_compressor
from planmoe_ds.choose import SERIAL_COMMS, TIE, LayerTraffic, in_words, predict
from planmoe_ds.compression import AUTO, NONE, CompressionConfig
from planmoe_ds.config import Exactness, PlanMoEConfig
from planmoe_ds.costs import ClusterCosts, LinkCost
from planmoe_ds.group import ExpertGroup
from planmoe_ds.topology import Topology

CANDIDATES = ("hadamard_int8", "int8")
LOSSLESS = "lossless"
LOSSLESS_DTYPE = torch.bfloat16
_AGREEMENTS = 0.75  # for each of a layer's four directions: see refusals.py
_RESTART_SECONDS = 1e-3  # of an accelerator whose host stopped to agree, and is not ahead of it any more
_MEASURED_BYTES = 1 << 22
_REPEATS = 5


@dataclass(frozen=True)
class CodecCost:
    """A codec for rows of one kind: bytes it makes of a byte, and seconds to encode and decode that byte.

    fixed_seconds: for each dispatch, whatever its size.
    """

    name: str
    ratio: float
    seconds_per_byte: float
    fixed_seconds: float = 0.0


@dataclass(frozen=True)
class CodecChoice:
    """The codecs, and a sentence that says why."""

    compression: CompressionConfig
    reason: str


def measure_codec(
    name: str, hidden: int, dtype: torch.dtype, device: torch.device, *, counts: bool = True
) -> CodecCost:
    """Median over a few rounds on this device, the slowest rank's; every rank of the world calls this together.

    counts: false on ranks that have no rows to encode.
    """
    codec = make_compressor(name)
    rows = torch.randn(max(1, _MEASURED_BYTES // (hidden * dtype.itemsize)), hidden, device=device).to(dtype)
    out, seconds = torch.empty_like(rows), []
    for _ in range(_REPEATS + 1):
        _synchronize(device)
        start = time.perf_counter()
        codec.decode(codec.encode(rows), out)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    everyone: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, counts * median(seconds[1:]) / (rows.numel() * rows.element_size()))
    return CodecCost(name, codec.row_bytes(hidden, dtype) / (hidden * dtype.itemsize), max(everyone))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def choose_codecs(
    costs: ClusterCosts, topology: Topology, traffic: LayerTraffic, comm: str, *codecs: CodecCost
) -> CodecChoice:
    """A codec on the classes of links where it saves more than 3 % of a dispatch with the all-to-all `comm`.

    codecs: those to choose from, the preferred ones first. Raises ValueError as `predict` does.
    """
    legs = _Legs(costs, topology, traffic, comm)
    without = legs.seconds(codecs[0], inter=False, intra=False)
    uses = ((True, False), (False, True), (True, True))  # inter, intra; the simplest first
    seconds = {(codec, *use): legs.seconds(codec, *use) for codec in codecs for use in uses}
    best = min(seconds, key=lambda option: seconds[option])
    limit = seconds[best] * (1 + TIE)
    if without <= limit:
        words = f"a dispatch is predicted to take {in_words(without)}, with {best[0].name} {in_words(seconds[best])}"
        return CodecChoice(CompressionConfig(), f"no codec: {words}")
    codec, inter, intra = chosen = next(option for option, predicted in seconds.items() if predicted <= limit)
    where = " and ".join(words for words, used in (("between nodes", inter), ("inside nodes", intra)) if used)
    return CodecChoice(
        CompressionConfig(inter=codec.name if inter else NONE, intra=codec.name if intra else NONE),
        f"{codec.name} {where}: a dispatch is predicted to take {in_words(seconds[chosen])} instead of "
        f"{in_words(without)}",
    )


class _Legs:
    """Bytes of a dispatch over both classes of links, and what they cost."""

    def __init__(self, costs: ClusterCosts, topology: Topology, traffic: LayerTraffic, comm: str) -> None:
        rows = predict(comm, costs, topology, traffic)
        per_row = traffic.tokens_per_rank * traffic.row_bytes
        self.intra_bytes, self.inter_bytes = rows.intra_rows * per_row, rows.inter_rows * per_row
        both = costs.intra_while_both is not None and self.intra_bytes > 0 and self.inter_bytes > 0
        self.in_turn = comm in SERIAL_COMMS
        busy = both and not self.in_turn
        self.intra = costs.intra_while_both if busy else costs.intra
        self.inter = costs.inter_while_both if busy else costs.inter

    def seconds(self, codec: CodecCost, inter: bool, intra: bool) -> float:
        """A dispatch with the codec on these classes of links."""
        legs = (
            _seconds(self.inter, self.inter_bytes * (codec.ratio if inter else 1.0)),
            _seconds(self.intra, self.intra_bytes * (codec.ratio if intra else 1.0)),
        )
        coded = self.inter_bytes * inter + self.intra_bytes * intra
        fixed = codec.fixed_seconds if coded > 0 else 0.0
        return (sum(legs) if self.in_turn else max(legs)) + coded * codec.seconds_per_byte + fixed


def _seconds(cost: LinkCost | None, num_bytes: float) -> float:
    return 0.0 if cost is None else cost.seconds(num_bytes)


def resolve_compression(
    config: PlanMoEConfig,
    connected: dict[str, ExpertGroup],
    traffic: dict[str, LayerTraffic],
    rows: tuple[int, torch.dtype, torch.device],
) -> dict[str, CodecChoice]:
    """The codecs of every group of `traffic` by name; every rank of the world calls this together.

    rows: hidden size, dtype and device of what travels, for measuring the codec.
    """
    hidden, dtype, device = rows
    if config.compression != AUTO:
        assert isinstance(config.compression, CompressionConfig)
        nodes = {name: set(connected[name].comm.node_of_rank) for name in traffic}
        return {name: _as_told(config.compression, dtype, len(used) > 1) for name, used in nodes.items()}
    may_lose = config.resolved_exactness is Exactness.LOSSY
    names, measured_dtype = (CANDIDATES, dtype) if may_lose else ((LOSSLESS,), LOSSLESS_DTYPE)
    measured = [measure_codec(name, hidden, measured_dtype, device, counts=bool(traffic)) for name in names]
    choices = {}
    for name, load in traffic.items():
        group = connected[name]
        if group.size == 1 or group.costs is None:
            choices[name] = CodecChoice(CompressionConfig(), "no codec: nothing travels")
        elif not may_lose and dtype is not LOSSLESS_DTYPE:
            choices[name] = CodecChoice(CompressionConfig(), f"no codec: {LOSSLESS} carries bfloat16 alone")
        else:
            topology = Topology(tuple(group.comm.node_of_rank))
            codecs = measured if may_lose else [with_agreements(codec, group.costs, device) for codec in measured]
            choices[name] = choose_codecs(group.costs, topology, load, group.choice.name, *codecs)
    return choices


def _as_told(compression: CompressionConfig, dtype: torch.dtype, crosses: bool) -> CodecChoice:
    """What a user chose, without the codecs between nodes where nothing crosses: hosts would agree on them in vain."""
    used = compression if crosses else compression.on_one_node()
    words = [compression.describe()]
    if used.names() != compression.names():
        words.append("nothing travels between nodes")
    if used.may_refuse() and dtype is not LOSSLESS_DTYPE:
        words.append(f"{LOSSLESS} carries bfloat16 alone, other rows travel as they are")
    return CodecChoice(used, "; ".join(words))


def with_agreements(codec: CodecCost, costs: ClusterCosts, device: torch.device) -> CodecCost:
    """A codec that may refuse rows, with what it takes to agree that it did not."""
    alphas = [link.alpha_seconds for link in (costs.intra, costs.inter) if link is not None]
    restart = 0.0 if device.type == "cpu" else _RESTART_SECONDS
    return replace(codec, fixed_seconds=_AGREEMENTS * (max(alphas) + restart))
