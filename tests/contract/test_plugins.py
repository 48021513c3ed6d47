"""All-to-alls and compressors written in Python: how they are registered and what their errors become."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import planmoe_ds
from planmoe_ds import _C, AbstractComm, AbstractCompressor, register_comm, register_compressor
from planmoe_ds.backend import (
    ChunkRows,
    Itinerary,
    RowRoutes,
    RowSums,
    comm_names,
    compressor_names,
    make_comm,
    make_compressor,
)
from planmoe_ds.errors import PlanMoEError
from tests.contract.plugins import PythonBfloat16, PythonComm, plugged_in, write_package
from tests.contract.traffic import new_comm
from tests.engine.support import make_layer, routes_of, run_layer
from tests.harness.ranks import RankPool


class OddError(Exception):
    """Nothing else raises it."""


class FailingCodec(PythonBfloat16):
    """Cannot encode on rank 0."""

    def encode_tensor(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if dist.get_rank() == 0:
            raise OddError("no rows today")
        return super().encode_tensor(rows, dtype)


def test_all_kinds_are_listed_and_made(package: str) -> None:
    with plugged_in(package):
        assert comm_names() == sorted([*_C.comm_names(), "installed", "python"])
        assert compressor_names() == sorted([*_C.compressor_names(), "installed-copy", "python-bf16"])
        assert type(make_compressor("installed-copy")).__name__ == "Copy"
        assert type(make_compressor("python-bf16")) is PythonBfloat16
        assert planmoe_ds.PlanMoEConfig(comm="installed", compression="python-bf16").comm == "installed"


def test_a_class_may_be_registered_again_as_the_same() -> None:
    with plugged_in():
        assert register_comm("python")(PythonComm) is PythonComm


@pytest.mark.parametrize("name", ["direct", "python"])
def test_a_taken_comm_name(name: str) -> None:
    class Other(PythonComm):
        pass

    with plugged_in(), pytest.raises(ValueError, match=f"algorithm '{name}' is registered twice.*Other"):
        register_comm(name)(Other)


@pytest.mark.parametrize("name", ["none", "python-bf16"])
def test_a_taken_compressor_name(name: str) -> None:
    with plugged_in(), pytest.raises(ValueError, match=f"compressor '{name}' is registered twice.*FailingCodec"):
        register_compressor(name)(FailingCodec)


@pytest.mark.parametrize("name", ["", "Ring", "2d", "ring all", "auto", 3])
def test_a_bad_name(name: str) -> None:
    with plugged_in():
        with pytest.raises(ValueError, match=rf"{name!r} is no name .*\(all-to-all algorithm\)"):
            register_comm(name)(PythonComm)
        with pytest.raises(ValueError, match=rf"{name!r} is no name .*\(compressor\)"):
            register_compressor(name)(PythonBfloat16)


def test_a_class_of_another_kind() -> None:
    with plugged_in():
        with pytest.raises(
            ValueError, match=r"'ring' is .*PythonBfloat16.*, expected a subclass of planmoe_ds.AbstractComm"
        ):
            register_comm("ring")(PythonBfloat16)
        with pytest.raises(
            ValueError, match=r"'half' is .*PythonComm.*, expected a subclass of planmoe_ds.AbstractCompressor"
        ):
            register_compressor("half")(PythonComm)


@pytest.mark.parametrize(
    ("source", "entry_points", "error", "words"),
    [
        ("import nowhere", "[planmoe_ds.comms]\nring = tiny_exchange:Ring", ImportError, "No module named 'nowhere'"),
        ("", "[planmoe_ds.comms]\nring = tiny_exchange:Ring", ImportError, "no attribute 'Ring'"),
        ("1 / 0", "[planmoe_ds.comms]\nring = tiny_exchange:Ring", ImportError, "ZeroDivisionError"),
        ("Ring = 3", "[planmoe_ds.comms]\nring = tiny_exchange:Ring", ValueError, "'ring' is 3, expected a subclass"),
        ("", "[planmoe_ds.comms]\ndirect = tiny_exchange:Ring", ValueError, "'direct' is registered twice"),
    ],
)
def test_a_broken_package(tmp_path: Path, source: str, entry_points: str, error: type, words: str) -> None:
    with plugged_in(write_package(tmp_path, source, entry_points)), pytest.raises(error, match=words) as raised:
        make_comm("ring", [], [], torch.device("cpu"))
    if "direct" in entry_points or error is ImportError:
        assert "the package 'tiny-exchange'" in str(raised.value)


def test_two_packages_of_one_name(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder, attribute in zip(folders, ["A", "B"], strict=True):
        folder.mkdir()
        write_package(folder, "", f"[planmoe_ds.comms]\nring = tiny_exchange:{attribute}")
    (folders[1] / "tiny_exchange-1.0.dist-info").rename(folders[1] / "other-1.0.dist-info")
    metadata = "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n"
    (folders[1] / "other-1.0.dist-info" / "METADATA").write_text(metadata)
    with plugged_in(str(folders[0])), pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folders[1]))
        with pytest.raises(ValueError, match="'ring' is registered twice"):
            comm_names()


def test_missing_methods_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"must define row_bytes\(\)"):
        AbstractCompressor().encode(torch.zeros(1, 2))


def test_a_wrong_shape_on_the_wire_is_named() -> None:
    class Short(PythonBfloat16):
        def encode_tensor(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            return super().encode_tensor(rows, dtype)[:, 1:]

    with pytest.raises(ValueError, match=r"encode_tensor must return uint8 \[3, 4\].*got Byte \[3, 3\]"):
        Short().encode(torch.zeros(3, 2))


def raise_in_post() -> None:
    with plugged_in():
        comm = new_comm("python")
        error = OddError("not now")
        if dist.get_rank() == 0:
            comm.failure = error
            with pytest.raises(OddError) as raised:
                comm.start(torch.zeros(2, 3), [1, 1], torch.zeros(2, 3), [1, 1])
            assert raised.value is error
            comm.failure = None
        recv = torch.ones(2, 3)
        comm.start(torch.zeros(2, 3), [1, 1], recv, [1, 1]).wait()
        assert recv.eq(0).all()
        without_post = AbstractComm(comm.groups, [0, 0], torch.device("cpu"))
        with pytest.raises(NotImplementedError, match=r"must define post\(self, parts\)"):
            without_post.start(recv, [1, 1], recv.clone(), [1, 1])


@pytest.mark.distributed
def test_what_post_raises_reaches_the_caller(ranks: RankPool) -> None:
    ranks.run(2, raise_in_post)


def layer_output(settings: dict[str, object]) -> torch.Tensor:
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randn(40, 16, generator=generator)
    expert_KT = torch.rand(40, 4, generator=generator).topk(2, dim=1).indices.t().contiguous()
    torch.manual_seed(3)
    experts = [torch.nn.Linear(16, 16, bias=False) for _ in range(4)]
    local = experts[rank * 4 // size : (rank + 1) * 4 // size]
    with torch.no_grad():
        return run_layer(make_layer(settings), tokens, routes_of(expert_KT, 4), local)


def compare_codecs(package: str) -> None:
    with plugged_in(package):
        for comm in ("direct", "dedup", "hierarchical", "installed", "python"):
            plain = layer_output({"comm": comm, "ranks_per_node": 2})
            same = layer_output({"comm": comm, "ranks_per_node": 2, "compression": "installed-copy"})
            assert torch.equal(same, plain), comm
            near = layer_output({"comm": comm, "ranks_per_node": 2, "compression": "python-bf16"})
            assert 0 < (near - plain).norm() / plain.norm() < 0.01, comm


@pytest.mark.distributed
def test_layers_with_python_codecs(ranks: RankPool, package: str) -> None:
    ranks.run(4, compare_codecs, package)


def raise_on_a_link() -> float:
    with plugged_in():
        register_compressor("failing")(FailingCodec)
        begin = time.monotonic()
        # on the way back dedup encodes on the link's thread; `dispatch` leaves the way out alone
        compression = {"combine": "failing"}
        layer = make_layer({"comm": "dedup", "ranks_per_node": 1, "timeout_seconds": 2, "compression": compression})
        expert_KT = torch.tensor([[1 - dist.get_rank()] * 8])
        told = "rank 0 stopped in layer 0 forward: OddError: no rows today"
        for turn in range(2):  # the second time the link is still broken, and everybody knows why
            own = dist.get_rank() == 0 and turn == 0
            expected, words = (OddError, "no rows today") if own else (PlanMoEError, told)
            with torch.no_grad(), pytest.raises(expected, match=words):
                run_layer(layer, torch.zeros(8, 4), routes_of(expert_KT, 2), [torch.nn.Identity()])
    return time.monotonic() - begin


@pytest.mark.distributed
def test_what_a_codec_raises_on_a_link_reaches_the_caller(ranks: RankPool) -> None:
    assert max(ranks.run(2, raise_on_a_link, fresh=True)) < 20


class SlowCodec(PythonBfloat16):
    """Lets other threads run while it encodes."""

    def encode_tensor(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        time.sleep(1.5)
        return super().encode_tensor(rows, dtype)


def drop_a_busy_comm() -> None:
    comm, peer = new_comm("dedup", (0, 1)), 1 - dist.get_rank()
    one = [0] * 2 * comm.num_pieces
    one[peer * comm.num_pieces] = 1  # a row each way, in the first piece
    itinerary = Itinerary(near_sent=[0, 0], near_received=[0, 0], far_sent=one, far_received=one, passed=one, fan=one)
    none = torch.empty(0, 8, dtype=torch.uint8)
    far = torch.zeros(2, 1, 8, dtype=torch.uint8)
    rows = ChunkRows(near_send=none, far_send=far[0], near_recv=none, far_recv=far[1])
    comm.dispatch(rows, itinerary, RowRoutes()).wait()
    sums = RowSums(inner=make_compressor("none"), outer=SlowCodec(), hidden=2, dtype=torch.float32)
    exchange = comm.combine(rows, itinerary, sums)
    time.sleep(0.1)  # the link's thread is in the codec and will want the interpreter's lock
    del comm
    with pytest.raises(RuntimeError, match="was shut down"):
        exchange.wait()


@pytest.mark.distributed
def test_a_busy_comm_may_be_dropped(ranks: RankPool) -> None:
    ranks.run(2, drop_a_busy_comm, timeout=20)
