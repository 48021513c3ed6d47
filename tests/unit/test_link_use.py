"""What the times of an exchange say of the links inside nodes and between them."""

from __future__ import annotations

import pytest

from planmoe_ds.executor import LinkUse, link_seconds

MS = 1_000_000
passed_on = [("onward", 2 * MS, 3 * MS), ("onward", 6 * MS, 7 * MS + MS // 2)]


@pytest.mark.parametrize(
    ("spans", "use", "expected"),
    [
        ([("exchange", 5 * MS, 9 * MS)], LinkUse(serial=False, crosses=True), (0.0, 4.0)),
        ([("exchange", 5 * MS, 9 * MS)], LinkUse(serial=False, crosses=False), (4.0, 0.0)),
        ([("intra", 0, 2 * MS), ("inter", 0, 7 * MS)], LinkUse(serial=False, crosses=True), (2.0, 7.0)),
        # hierarchical: counts and rows inside, then rows between; that link waits from the start
        (
            [("intra", 0, MS), ("intra", MS, 3 * MS), ("inter", 0, 10 * MS)],
            LinkUse(serial=True, crosses=True),
            (3.0, 7.0),
        ),
        ([("inter", 2 * MS, 10 * MS)], LinkUse(serial=True, crosses=True), (0.0, 8.0)),
        # pieces wait on one link for those on the other, and nothing else travels there meanwhile
        (
            [("inter", 0, 2 * MS), ("inter", 2 * MS, 6 * MS), ("intra", 0, MS), ("intra", 3 * MS, 7 * MS)],
            LinkUse(serial=False, crosses=True),
            (7.0, 6.0),
        ),
        # dedup: the link inside is free between pieces that are passed on
        (
            [("inter", 0, 2 * MS), ("inter", 2 * MS, 6 * MS), ("intra", 0, MS), *passed_on],
            LinkUse(serial=False, crosses=True),
            (3.5, 6.0),
        ),
        # and where they travel at once it is busy once
        (
            [("inter", 0, 4 * MS), ("intra", 0, 6 * MS), ("onward", MS, 3 * MS), ("onward", 4 * MS, 7 * MS)],
            LinkUse(serial=False, crosses=True),
            (7.0, 4.0),
        ),
        ([], LinkUse(serial=False, crosses=True), (0.0, 0.0)),
    ],
)
def test_links(spans: list[tuple[str, int, int]], use: LinkUse, expected: tuple[float, float]) -> None:
    assert link_seconds(spans, use) == pytest.approx([seconds * 1e-3 for seconds in expected])
