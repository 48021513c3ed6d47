"""All-to-alls and compressors written in Python: in this package, and in a tiny package with entry points."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

from planmoe_ds import AbstractComm, AbstractCompressor, backend, plugins

Parts = list[tuple[torch.Tensor, list[int], torch.Tensor, list[int]]]


class Works:
    """Several works as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class PythonComm(AbstractComm):
    """Sends and receives with every peer, all in flight at once."""

    failure: Exception | None = None

    def post(self, parts: Parts) -> Works:
        if self.failure is not None:
            raise self.failure
        group, works = self.groups[0], []
        for send, send_rows, recv, recv_rows in parts:
            for peer, (out, back) in enumerate(zip(send.split(send_rows), recv.split(recv_rows), strict=True)):
                if peer == self.rank:
                    back.copy_(out)
                    continue
                global_rank = dist.get_global_rank(group, peer)
                if back.numel():
                    works.append(dist.irecv(back, global_rank, group=group))
                if out.numel():
                    works.append(dist.isend(out, global_rank, group=group))
        return Works(works)


class PythonBfloat16(AbstractCompressor):
    """Two bytes per value."""

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        return 2 * hidden

    def is_lossless(self) -> bool:
        return False

    def encode_tensor(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return rows.bfloat16().view(torch.uint8)

    def decode_tensor(self, wire: torch.Tensor, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        return wire.view(torch.bfloat16).to(dtype)


PACKAGE = """
import torch
import torch.distributed as dist
from planmoe_ds import AbstractComm, AbstractCompressor

class Installed(AbstractComm):
    def post(self, parts):
        for send, send_rows, recv, recv_rows in parts:
            dist.all_to_all_single(recv, send, recv_rows, send_rows, group=self.groups[0])

class Copy(AbstractCompressor):
    def row_bytes(self, hidden, dtype):
        return hidden * dtype.itemsize
    def is_lossless(self):
        return True
    def encode_tensor(self, rows, dtype):
        return rows.to(dtype).view(torch.uint8)
    def decode_tensor(self, wire, hidden, dtype):
        return wire.view(dtype)
"""
ENTRY_POINTS = """
[planmoe_ds.comms]
installed = tiny_exchange:Installed
[planmoe_ds.compressors]
installed-copy = tiny_exchange:Copy
"""


def write_package(folder: Path, source: str = PACKAGE, entry_points: str = ENTRY_POINTS) -> str:
    """The package "tiny-exchange" as pip would install it; returns what to put on sys.path."""
    (folder / "tiny_exchange.py").write_text(source)
    info = folder / "tiny_exchange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-exchange\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return str(folder)


@contextmanager
def plugged_in(folder: str | None = None) -> Iterator[None]:
    """With this module's classes registered as "python" and "python-bf16", and the package in `folder` installed."""
    registry = plugins.Plugins()
    path = sys.path if folder is None else [folder, *sys.path]
    importlib.invalidate_caches()
    with (
        patch.object(plugins, "PLUGINS", registry),
        patch.object(backend, "PLUGINS", registry),
        patch.object(sys, "path", path),
        patch.dict(sys.modules),
    ):
        sys.modules.pop("tiny_exchange", None)
        plugins.register_comm("python")(PythonComm)
        plugins.register_compressor("python-bf16")(PythonBfloat16)
        yield
