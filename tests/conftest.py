"""Fixtures and markers shared by all tests."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.harness.ranks import RankPool

_MARKERS = {
    "distributed": "runs on several rank processes",
    "gpu": "needs a CUDA device; skipped without one",
    "slow": "takes more than about ten seconds",
}


# No time limit for an example, on machines that are busy; the same examples in every run, so that a failure after a
# change is the change's. --hypothesis-profile=new looks for others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("same")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for name, meaning in _MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the other shards' tests out; skip the gpu tests, saying why, where there is no CUDA device."""
    number, total = config.getoption("--shard")
    items[:] = items[number - 1 :: total]
    gpu_items = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu_items:
        return
    reason = _why_no_gpu()
    if reason:
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"needs a CUDA device; torch {torch.__version__} is a CPU build"
    return "" if torch.cuda.is_available() else "needs a CUDA device; torch.cuda.is_available() is False"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the distributed tests run on GPUs."""
    parser.addoption("--backend", choices=["gloo", "nccl"], default="gloo", help="process groups of distributed tests")
    parser.addoption(
        "--ranks-per-host", type=int, default=0, help="NCCL: ranks that it takes to be on one host; 0: all of them"
    )
    parser.addoption(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="run every N-th test only, from the I-th on"
    )


def _shard(text: str) -> tuple[int, int]:
    number, slash, total = text.partition("/")
    if not (slash and number.isdigit() and total.isdigit() and 1 <= int(number) <= int(total)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected I/N with 1 <= I <= N")
    return int(number), int(total)


def make_pool(config: pytest.Config, backend: str | None = None, preload: bool = True) -> RankPool:
    """Rank processes as the command line wants them."""
    backend = backend or config.getoption("--backend")
    return RankPool(backend, preload=preload, ranks_per_host=config.getoption("--ranks-per-host"))


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """Rank processes, over gloo on the CPU unless told otherwise, for the whole session; see tests/harness/ranks.py."""
    pool = make_pool(pytestconfig)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpu_ranks(pytestconfig: pytest.Config) -> Iterator[RankPool]:
    """Rank processes over NCCL that see the machine's CUDA devices; for tests marked gpu."""
    pool = make_pool(pytestconfig, "nccl")
    yield pool
    pool.close()
