"""What every training step measured, averaged or summed over ranks, kept across resumes as a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from errors import ExampleError
from files import write_whole


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step: loss in nats per byte, times in seconds per rank, bytes over all ranks (0 where not measured)."""

    step: int
    loss: float
    learning_rate: float
    seconds: float
    tokens_per_second: float
    bytes_sent: int = 0
    stock_bytes: int = 0
    exposed_seconds: float = 0.0
    communication_seconds: float = 0.0
    expert_seconds: float = 0.0


SUMMED_OVER_RANKS = ("bytes_sent", "stock_bytes")


class History:
    """Steps measured on this rank, turned into records of all ranks once per checkpoint, not once per step."""

    def __init__(self, records: Sequence[StepRecord] = ()) -> None:
        self.records = list(records)
        self._pending: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Keep this rank's numbers of one step."""
        self._pending.append(record)

    def merge_ranks(self, device: torch.device, path: Path) -> None:
        """Reduce the steps since the last call over all ranks, and write all records as CSV on the first.

        Collective: every rank calls it after the same step.
        """
        rows = [list(asdict(record).values()) for record in self._pending]
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        dist.all_reduce(table)
        divisors = [1 if field.name in SUMMED_OVER_RANKS else dist.get_world_size() for field in fields(StepRecord)]
        merged = table / torch.tensor(divisors, device=device)
        self.records.extend(_record_from([str(value) for value in row]) for row in merged.tolist())
        self._pending.clear()
        if dist.get_rank() == 0:
            self._write(path)

    def _write(self, path: Path) -> None:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [field.name for field in fields(StepRecord)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in self.records)
        write_whole(path, stream.getvalue())


def read_history(path: Path, last_step: int) -> list[StepRecord]:
    """Read the records up to last_step, or none where there is no file; ExampleError for a file of another make."""
    if last_step == 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = list(csv.reader(stream)) or [[]]
    if header != [field.name for field in fields(StepRecord)]:
        raise ExampleError(f"{path} has other columns than this version writes: move it away or use another --output")
    return [record for record in map(_record_from, rows) if record.step <= last_step]


def _record_from(row: Sequence[str]) -> StepRecord:
    integers = ("step", *SUMMED_OVER_RANKS)
    names = [field.name for field in fields(StepRecord)]
    values: dict[str, Any] = {
        name: round(float(text)) if name in integers else float(text) for name, text in zip(names, row, strict=True)
    }
    return StepRecord(**values)
