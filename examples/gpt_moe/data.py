"""Bytes to train on: the Python standard library's own sources, or files of one's own."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from errors import ExampleError

Split = Literal["training", "validation"]

VOCABULARY_SIZE = 256
VALIDATION_SHARE = 0.05
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)


@dataclass(frozen=True)
class ByteData:
    """Training and validation bytes, both uint8 of shape [length]; no byte is in both."""

    training: Tensor
    validation: Tensor
    num_files: int

    def batch(self, split: Split, index: int, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both int64 of shape [batch, sequence]: a pure function of the arguments."""
        batch_size, sequence_length = shape
        source = self.training if split == "training" else self.validation
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        starts = torch.randint(source.numel() - sequence_length, (batch_size, 1), generator=generator)
        windows = source[starts + torch.arange(sequence_length + 1)].long()
        return windows[:, :-1], windows[:, 1:]


def standard_library_files() -> list[Path]:
    """Return this interpreter's standard-library sources in a fixed order, tests and tables left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    wanted = (path for path in root.rglob("*.py") if not SKIPPED_DIRECTORIES.intersection(path.parts))
    return sorted(path for path in wanted if path.stat().st_size > 0)


def load_bytes(files: Sequence[Path], sequence_length: int) -> ByteData:
    """Read the files (the standard library when none) and hold out the last twentieth of each for validation.

    Raises ExampleError for a missing, unreadable or empty file, or for too few bytes for one sequence.
    """
    paths = list(files) if files else standard_library_files()
    if not paths:
        raise ExampleError("this Python has no standard-library sources on disk: name files of your own with --data")
    contents = [_read(path) for path in paths]
    cuts = [int(len(content) * (1.0 - VALIDATION_SHARE)) for content in contents]
    training = b"".join(content[:cut] for content, cut in zip(contents, cuts, strict=True))
    validation = b"".join(content[cut:] for content, cut in zip(contents, cuts, strict=True))
    if len(validation) <= sequence_length:
        minimum = int((sequence_length + 1) / VALIDATION_SHARE) + 1
        raise ExampleError(
            f"--data holds {len(training) + len(validation)} bytes in {len(paths)} file(s), too few: a sequence length "
            f"of {sequence_length} needs about {minimum}. Add files or lower --sequence-length"
        )
    return ByteData(_to_tensor(training), _to_tensor(validation), len(paths))


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte of logits [B, S, V] against targets int64 [B, S], computed in fp32."""
    return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExampleError(
            f"cannot read the data file {path}: {error.strerror}. Check the path given to --data"
        ) from error
    if not content:
        raise ExampleError(f"the data file {path} is empty: leave it out of --data")
    return content


def _to_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
