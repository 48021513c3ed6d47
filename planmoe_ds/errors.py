"""Errors that users of planmoe_ds see."""

from __future__ import annotations


class PlanMoEError(RuntimeError):
    """Something went wrong while planmoe ran; the message says what, where and what to do."""


class PlanMoEConfigError(ValueError):
    """A planmoe setting that cannot work; the message names the key, the value and what is allowed."""


class PlanMoEMismatchError(PlanMoEError):
    """Ranks disagree; the message names who has what."""
