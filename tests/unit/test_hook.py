"""The post-import hook runs once, for modules imported before and after, and leaves other imports alone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from planmoe_ds.hook import when_imported


def test_runs_now_for_a_loaded_module() -> None:
    seen: list[object] = []
    when_imported("json", seen.append)
    assert seen == [sys.modules["json"]]


def test_runs_once_after_a_later_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_later.py").write_text("value = 41\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    seen: list[int] = []

    def action(module: object) -> None:
        seen.append(module.value)  # type: ignore[attr-defined]
        module.value += 1  # type: ignore[attr-defined]

    when_imported("imported_later", action)
    assert seen == []
    module = importlib.import_module("imported_later")
    assert (seen, module.value) == ([41], 42)
    importlib.reload(module)
    assert seen == [41]
    assert sys.meta_path == before


def test_a_module_that_is_never_found_is_reported_as_usual() -> None:
    when_imported("no_such_module_anywhere", lambda module: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        importlib.import_module("no_such_module_anywhere")
