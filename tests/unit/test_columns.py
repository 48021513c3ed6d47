"""What rows carry behind their values: gather_bytes and pack_columns, on the CPU and on GPUs."""

from __future__ import annotations

import pytest
import torch

from planmoe_ds.backend import gather_bytes, pack_columns

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def numbers(rows: int, width: int, device: str) -> torch.Tensor:
    """uint8 [rows, width], drawn."""
    return torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(1)).byte().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [1, 4, 16, 48])
@pytest.mark.parametrize("before", [0, 8, 16])
@pytest.mark.parametrize("indexed", [False, True])
def test_only_the_columns_are_written(device: str, width: int, before: int, indexed: bool) -> None:
    source = numbers(9, width, device)
    index = torch.tensor([8, 0, 3, 3, 7], device=device) if indexed else None
    expected = source if index is None else source[index]
    wide = torch.full((expected.shape[0], before + width + 16), 0xAB, dtype=torch.uint8, device=device)
    gather_bytes(source, index, wide[:, before : before + width])
    assert torch.equal(wide[:, before : before + width], expected)
    assert (wide[:, :before] == 0xAB).all()
    assert (wide[:, before + width :] == 0xAB).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_to_gather(device: str) -> None:
    gather_bytes(numbers(3, 4, device), torch.zeros(0, dtype=torch.int64, device=device), numbers(0, 4, device))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [((3, 4), (2, 4), "do not fit"), ((3, 4), (3, 5), "do not fit"), ((12,), (3, 4), "do not fit")],
)
def test_rows_that_do_not_fit(source: tuple[int, ...], target: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gather_bytes(torch.zeros(source, dtype=torch.uint8), None, torch.zeros(target, dtype=torch.uint8))


def test_rows_that_are_not_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        gather_bytes(numbers(4, 3, "cpu").t(), None, torch.zeros(3, 4, dtype=torch.uint8))


def packed_by_torch(columns: list[tuple[torch.Tensor, int]], width: int) -> torch.Tensor:
    """What pack_columns says, with zeros behind the columns."""
    parts = []
    for values, size in columns:
        in_rows = values.cpu().t().clone(memory_format=torch.contiguous_format)
        parts.append(in_rows.view(torch.uint8).view(*in_rows.shape, -1)[..., :size].flatten(1))
    rows = torch.cat(parts, dim=1)
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("id_bytes", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_packed(
    device: str, top_k: int, weight_dtype: torch.dtype, id_bytes: int, transposed: bool
) -> None:
    draw = torch.Generator().manual_seed(2)
    shape = (300, top_k) if transposed else (top_k, 300)
    weights = torch.rand(shape, generator=draw).to(device, weight_dtype)
    places, experts = (
        torch.randint(-1, 30000, shape, generator=draw).to(device, kind) for kind in (torch.int32, torch.int64)
    )
    values = [each.t() if transposed else each for each in (weights, places, experts)]
    columns = list(zip(values, (weights.element_size(), 4, id_bytes), strict=True))
    used = top_k * sum(size for _, size in columns)
    rows = pack_columns(columns, used + 5)
    assert rows.shape == (300, used + 5)
    assert torch.equal(rows[:, :used].cpu(), packed_by_torch(columns, used))


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_to_pack(device: str) -> None:
    assert pack_columns([(torch.zeros((2, 0), device=device), 4)], 16).shape == (0, 16)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([], "at least one column"),
        ([(torch.zeros(2, 3), 4), (torch.zeros(2, 4), 4)], "one T"),
        ([(torch.zeros(3), 4)], "one T"),
        ([(torch.zeros((2, 3), dtype=torch.int16), 4)], "Short numbers have 2 bytes, 4 were asked for"),
        ([(torch.zeros(5, 3), 4)], "20 bytes do not fit rows of 16"),
    ],
)
def test_columns_that_cannot_be(columns: list[tuple[torch.Tensor, int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack_columns(columns, 16)
