"""Rank processes of their own: what lets Megatron run on the CPU changes torch for the whole process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.conftest import make_pool
from tests.harness.ranks import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what trains with Megatron where it is not installed."""
    if importlib.util.find_spec("megatron") is not None:
        return
    for item in items:
        if "megatron_ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="megatron-core is not installed"))


@pytest.fixture(scope="session")
def megatron_ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """Rank processes for Megatron alone."""
    pool = make_pool(pytestconfig, preload=False)
    yield pool
    pool.close()
