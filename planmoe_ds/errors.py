"""Errors that users of planmoe_ds see."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class PlanMoEError(RuntimeError):
    """Something went wrong while planmoe ran; the message says what, where and what to do."""


class PlanMoEConfigError(ValueError):
    """A planmoe setting that cannot work; the message names the key, the value and what is allowed."""


class PlanMoEMismatchError(PlanMoEError):
    """Ranks disagree; the message names who has what."""


def first_problem(error: ValidationError) -> str:
    """Where in a file the first thing is that cannot be, and why."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"]) or "file"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"
