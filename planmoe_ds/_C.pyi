"""Types of the compiled backend; the bindings are in csrc/python/, what the classes do is said in csrc/."""

from typing import Any, Literal

import torch
from torch.distributed import ProcessGroup

class Stamp:
    def ns(self) -> int: ...

class Clock:
    def __init__(self, device: torch.device) -> None: ...
    def stamp(self) -> Stamp: ...

class Exchange:
    def wait(self) -> None: ...
    def spans(self) -> list[tuple[Literal["exchange", "intra", "onward", "inter"], int, int]]: ...
    def bytes_sent_on(self, lane: str) -> int: ...
    @property
    def number(self) -> int:
        """Its place among the exchanges of its all-to-all, the same on every rank."""

    @property
    def passed(self) -> bool:
        """Accelerators: whether the device has got past it."""

    @property
    def bytes_sent(self) -> int:
        """Bytes to other ranks, final once waited for."""

class ExchangeSpec:
    def __init__(self, send: torch.Tensor, send_rows: list[int], recv: torch.Tensor, recv_rows: list[int]) -> None: ...

class Itinerary:
    def __init__(
        self,
        *,
        near_sent: list[int],
        near_received: list[int],
        far_sent: list[int],
        far_received: list[int],
        passed: list[int],
        fan: list[int],
    ) -> None: ...
    @property
    def near_sent(self) -> list[int]: ...
    @property
    def near_received(self) -> list[int]: ...
    @property
    def far_sent(self) -> list[int]: ...
    @property
    def far_received(self) -> list[int]: ...

class ChunkRows:
    def __init__(
        self, *, near_send: torch.Tensor, far_send: torch.Tensor, near_recv: torch.Tensor, far_recv: torch.Tensor
    ) -> None: ...

class RowRoutes:
    def __init__(
        self,
        *,
        offset: int = 0,
        top_k: int = 0,
        id_bytes: int = 4,
        experts_per_rank: int = 1,
        first_expert: int = 0,
        last_expert: int = 1,
    ) -> None: ...

class RowSums:
    def __init__(
        self, *, inner: Compressor, outer: Compressor, hidden: int, dtype: torch.dtype, extra: int = 0
    ) -> None: ...

class LaunchLedger:
    def __init__(self, world_size: int) -> None: ...
    def record(self, communicator: int, global_ranks: tuple[int, ...] | list[int]) -> None: ...
    def digests(self, global_ranks: tuple[int, ...] | list[int]) -> list[int]: ...

class Comm:
    """An all-to-all with variable splits over the ranks of a group; subclasses define post()."""

    def __init__(
        self, groups: list[ProcessGroup], node_of_rank: list[int], device: torch.device, timeout_ms: int = 0
    ) -> None: ...
    def post(self, parts: list[tuple[torch.Tensor, list[int], torch.Tensor, list[int]]]) -> Any:
        """Start one exchange of several parts; only Python subclasses have it, and must.

        A part is (send, send_rows, recv, recv_rows): send uint8 [sum(send_rows), W] has send_rows[p] rows for every
        group rank p, in that order; recv uint8 [sum(recv_rows), W] is to be filled likewise. Requests have been
        checked. Returns an object whose wait() returns when the rows are there, or None when they are.
        """

    @property
    def groups(self) -> list[ProcessGroup]: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def node_of_rank(self) -> list[int]: ...
    @property
    def first_hops(self) -> list[int]: ...
    @property
    def num_pieces(self) -> int: ...
    @property
    def passes_on(self) -> bool: ...
    def set_phase(self, phase: int) -> None:
        """Exchanges that start from now on are never taken for those of another phase, 0 to 127, on another rank."""

    def abort(self, reason: str) -> None:
        """End what is in flight, from any thread: its waits, and all later ones, raise RuntimeError(reason)."""

    def close(self) -> None: ...
    def take_buffer(self, rows: int, width: int) -> torch.Tensor: ...
    def take_peak_bytes(self) -> int:
        """Most bytes of such buffers in use at once since the last call."""

    def start(self, send: torch.Tensor, send_rows: list[int], recv: torch.Tensor, recv_rows: list[int]) -> Exchange: ...
    def start_parts(self, parts: list[ExchangeSpec]) -> Exchange: ...
    def dispatch(self, rows: ChunkRows, itinerary: Itinerary, routes: RowRoutes) -> Exchange: ...
    def combine(self, rows: ChunkRows, itinerary: Itinerary, sums: RowSums) -> Exchange: ...

class Compressor:
    """A wire codec; subclasses define row_bytes(), is_lossless(), encode_tensor() and decode_tensor().

    Their methods may be called from several threads. Rows are independent of each other.
    """

    def __init__(self) -> None: ...
    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes on the wire of one row of `hidden` values of `dtype` (float32, float16, bfloat16)."""

    def is_lossless(self) -> bool:
        """Whether decoding returns the rows bit for bit; only Python subclasses have it, and must."""

    def encode_tensor(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[N, hidden], float32 or `dtype` -> uint8 [N, row_bytes(hidden, dtype)]; only Python subclasses have it."""

    def decode_tensor(self, wire: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """uint8 [N, row_bytes] -> [N, hidden], float32 or `dtype`; only Python subclasses have it."""

    @property
    def lossless(self) -> bool: ...
    @property
    def identity(self) -> bool:
        """Whether the wire holds the values themselves."""
    @property
    def may_refuse(self) -> bool:
        """Whether there are rows that it cannot carry; they come back as NaN, in whole blocks."""

    def carries(self, dtype: torch.dtype) -> bool:
        """Whether it takes rows of `dtype`."""

    def misfits(self, rows: torch.Tensor) -> torch.Tensor:
        """int32 [1] on the rows' device, not zero where a row of [N, hidden] cannot be carried."""

    def take_refused(self) -> bool:
        """Whether a row encoded since the last call could not be carried; waits until they are encoded."""

    def encode(self, rows: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor: ...
    def encode_into(self, rows: torch.Tensor, index: torch.Tensor | None, wire: torch.Tensor) -> None: ...
    def decode(self, wire: torch.Tensor, out: torch.Tensor, index: torch.Tensor | None = None) -> None: ...

class Spread:
    """Which rows of a buffer each wire row feeds: wire row i has entries start[i] to start[i + 1] - 1 of M."""

    @property
    def start(self) -> torch.Tensor:
        """int64 [R + 1]."""

    @property
    def target(self) -> torch.Tensor:
        """int64 [M]."""

    @property
    def weight(self) -> torch.Tensor:
        """[M] float32, float64 for float64 rows."""

    @property
    def route(self) -> torch.Tensor:
        """int64 [M]: which of its token's K routes it is."""

    @property
    def source(self) -> torch.Tensor:
        """int64 [M]: the wire row."""

class TokenOrder:
    """See csrc/kernels/routing.h: X chunks, P ranks, B pieces, G most ranks on a node, E experts."""

    @property
    def near_token(self) -> list[torch.Tensor]: ...
    @property
    def far_token(self) -> list[torch.Tensor]: ...
    @property
    def near_sent(self) -> torch.Tensor:
        """int64 [X, P]."""

    @property
    def far_sent(self) -> torch.Tensor:
        """int64 [X, P, B]."""

    @property
    def far_final(self) -> torch.Tensor:
        """int64 [X, P, B]."""

    @property
    def fan(self) -> torch.Tensor:
        """int64 [X, P, B, G]."""

    @property
    def expert_rows(self) -> torch.Tensor:
        """int64 [X, E]."""

def make_comm(
    name: str, groups: list[ProcessGroup], node_of_rank: list[int], device: torch.device, timeout_ms: int = 0
) -> Comm: ...
def make_compressor(name: str) -> Compressor:
    """`name` or `name:setting`."""

def comm_names() -> list[str]: ...
def compressor_names() -> list[str]: ...
def build_info() -> dict[str, str]: ...
def aligned(num_bytes: int) -> int:
    """Rounded up to a multiple of eight."""

def order_tokens(
    *,
    expert: torch.Tensor,
    num_experts: int,
    num_chunks: int,
    chunk_by_expert: bool,
    chunk_of_rank: list[int],
    rank: int,
    node_of_rank: list[int],
    first_hop: list[int],
    num_pieces: int,
    rows_per_piece: int,
) -> TokenOrder:
    """expert: int64 [K, T] on the CPU, negative for dropped routes."""

class OrderedTokens:
    """See csrc/kernels/routing.h."""

    @property
    def tokens(self) -> torch.Tensor: ...
    @property
    def near_return(self) -> torch.Tensor: ...
    @property
    def far_return(self) -> torch.Tensor | None: ...

def order_tokens_on_device(
    *,
    expert: torch.Tensor,
    num_experts: int,
    num_chunks: int,
    chunk_by_expert: bool,
    chunk_of_rank: list[int],
    rank: int,
    node_of_rank: list[int],
    first_hop: list[int],
    num_pieces: int,
    rows_per_piece: int,
    tables: torch.Tensor,
    message: torch.Tensor,
    first_column: int,
) -> OrderedTokens:
    """expert: int32 or int64 [K, T] on an accelerator with kernels; adds its counts to `message`."""

def routes_on_device(tensor: torch.Tensor) -> bool:
    """Whether this build has kernels for the device of `tensor`."""

def find_experts(
    *,
    rows: torch.Tensor,
    routes: RowRoutes,
    first_id: int,
    num_entries: int,
    weight_offset: int,
    weight_dtype: torch.dtype,
    row_dtype: torch.dtype,
    base: list[int],
    source_rows: list[int],
    place_offset: int = -1,
    table: torch.Tensor | None = None,
    num_places: int = -1,
) -> Spread:
    """See ArrivedRows in csrc/kernels/routing.h."""

def unpack_add(
    codec: Compressor,
    wire: torch.Tensor,
    dtype: torch.dtype,
    index: torch.Tensor | None,
    sum: torch.Tensor,  # noqa: A002
    distinct: bool = False,
) -> None: ...
def sum_rows(
    codec: Compressor,
    wire: torch.Tensor,
    dtype: torch.dtype,
    returns: torch.Tensor,
    base: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """out[t] = base[t] + sum over s of decode(wire[returns[t, s]]); accelerators only, see sums_on_device."""

def sums_on_device(codec: Compressor, dtype: torch.dtype, like: torch.Tensor) -> bool: ...
def spread_rows(codec: Compressor, wire: torch.Tensor, spread: Spread, weighted: bool, out: torch.Tensor) -> None: ...
def gather_bytes(from_: torch.Tensor, index: torch.Tensor | None, to: torch.Tensor) -> None:
    """Bytes [n, W]: to[i] = from_[index[i]], or from_[i] without an index; `to` may be columns of wider rows."""

def pack_columns(columns: list[tuple[torch.Tensor, int]], width: int) -> torch.Tensor:
    """Numbers [K, T] and bytes to take of each -> uint8 [T, width], the numbers of each row one after the other."""

def fold_rows(codec: Compressor, rows: torch.Tensor, spread: Spread, weighted: bool, wire: torch.Tensor) -> None: ...
def dot_rows(codec: Compressor, wire: torch.Tensor, spread: Spread, rows: torch.Tensor, top_k: int) -> torch.Tensor: ...

class GateDecision:
    """See csrc/kernels/gate.h for shapes and dtypes."""

    balance_loss: torch.Tensor
    expert: torch.Tensor
    slot: torch.Tensor
    weight: torch.Tensor
    counts: torch.Tensor
    probs: torch.Tensor
    total: torch.Tensor
    share: torch.Tensor

def decide_gate(
    logits: torch.Tensor, *, top_k: int, capacity: int, samples: bool, drops_at_random: bool
) -> GateDecision: ...
def gate_gradient(
    expert: torch.Tensor,
    probs: torch.Tensor,
    total: torch.Tensor,
    share: torch.Tensor,
    weight_grad: torch.Tensor | None,
    loss_grad: torch.Tensor | None,
) -> torch.Tensor:
    """The logits' gradient, float32 [T, E]."""

def gate_runs_on(tensor: torch.Tensor) -> bool: ...

class ScheduleTask:
    """See csrc/scheduler/problem.h; legs are (resource, seconds)."""

    def __init__(
        self,
        legs: list[tuple[int, float]],
        after: list[int],
        *,
        serial: bool = False,
        latency: float = 0.0,
        twin: int = -1,
    ) -> None: ...

class ScheduleProblem:
    def __init__(self, num_resources: int, tasks: list[ScheduleTask]) -> None: ...
    def tail(self, task: int) -> float:
        """Least seconds from the end of a task to the end of everything."""

class Timetable:
    @property
    def starts(self) -> list[list[float]]:
        """By task and leg."""

    @property
    def ends(self) -> list[float]: ...
    @property
    def makespan(self) -> float: ...

class Solution:
    @property
    def order(self) -> list[int]: ...
    @property
    def makespan(self) -> float: ...
    @property
    def lower_bound(self) -> float: ...
    @property
    def is_optimal(self) -> bool: ...
    @property
    def num_nodes(self) -> int: ...

def simulate_schedule(problem: ScheduleProblem, order: list[int]) -> Timetable: ...
def solve_schedule(problem: ScheduleProblem, seeds: list[list[int]], seconds: float, max_nodes: int) -> Solution: ...
