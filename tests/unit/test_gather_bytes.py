"""gather_bytes writes rows of bytes into columns of wider rows, on the CPU and on GPUs."""

from __future__ import annotations

import pytest
import torch

from planmoe_ds.backend import gather_bytes

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
def test_no_rows(device: str) -> None:
    gather_bytes(numbers(3, 4, device), torch.zeros(0, dtype=torch.int64, device=device), numbers(0, 4, device))


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [((3, 4), (2, 4), "do not fit"), ((3, 4), (3, 5), "do not fit"), ((12,), (3, 4), "do not fit")],
)
def test_bad_shapes(source: tuple[int, ...], target: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gather_bytes(torch.zeros(source, dtype=torch.uint8), None, torch.zeros(target, dtype=torch.uint8))


def test_rows_that_are_not_contiguous() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        gather_bytes(numbers(4, 3, "cpu").t(), None, torch.zeros(3, 4, dtype=torch.uint8))
