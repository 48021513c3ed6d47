"""What one check reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "problem", "info"]


@dataclass(frozen=True)
class Finding:
    """State of one component: `missing` is an optional part that is absent, `problem` needs a repair.

    `required` marks what planmoe_ds cannot run without; `advice` says what to do, and is empty when all is well.
    """

    component: str
    status: Status
    version: str = ""
    detail: str = ""
    advice: str = ""
    required: bool = False
