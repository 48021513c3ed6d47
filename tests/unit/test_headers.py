"""Headers of layer calls: what differs is named, and what is no header is not taken for one."""

from __future__ import annotations

import re

import pytest

from planmoe_ds.errors import PlanMoEMismatchError
from planmoe_ds.headers import Header, check_headers

MINE = Header(layer=3, hidden_size=16, routes_per_token=2, num_experts=8)


def test_equal_headers_pass() -> None:
    check_headers([MINE.numbers()] * 3, MINE, [4, 5, 6])


def test_the_first_difference_is_named() -> None:
    theirs = Header(layer=3, hidden_size=32, routes_per_token=1, num_experts=8)
    with pytest.raises(PlanMoEMismatchError, match="disagree on hidden_size: rank 4: 16; rank 5: 32"):
        check_headers([MINE.numbers(), theirs.numbers()], MINE, [4, 5])


def test_rows_are_not_taken_for_a_header() -> None:
    """Over NCCL a rank that plans can receive what another one sends in a pass."""
    rows = [4575657222473777152] * len(MINE.numbers())
    expected = "ranks [5] sent something else than the opening of layer 3, with gradients: they are in another exchange"
    with pytest.raises(PlanMoEMismatchError, match=re.escape(expected)):
        check_headers([MINE.numbers(), rows], MINE, [4, 5])
