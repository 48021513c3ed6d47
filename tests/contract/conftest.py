"""The tiny package that brings an all-to-all and a compressor through entry points."""

from __future__ import annotations

import pytest

from tests.contract.plugins import write_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its folder."""
    return write_package(tmp_path_factory.mktemp("package"))
