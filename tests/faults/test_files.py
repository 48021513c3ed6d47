"""Files that planmoe reads back: damaged ones are refused on every rank with their name, and none can run code."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

import planmoe_ds
from planmoe_ds.execution import load_execution
from planmoe_ds.executor import vector_of
from planmoe_ds.planner import MEASURED, WARM_UP
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts
from tests.faults.layers import Model, batch, seconds_until_error
from tests.harness.ranks import RankPool

ROOT = Path(planmoe_ds.__file__).resolve().parents[1]


def step(folder: str) -> tuple[float, str, str]:
    model = Model({"scheduler": "optimal", "plans": folder})
    return seconds_until_error(lambda: model.forward(*batch()))


def learn(folder: str) -> None:
    """Train until the plans are written."""
    model = Model({"scheduler": "optimal", "plans": folder})
    costs = ChunkCosts(1.0, ExchangeCosts(1.0, 2.0), 1.0, 3.0, 1.0, ExchangeCosts(1.0, 2.0), 1.0)
    chosen = vector_of([costs] * 2, None)
    for layer in model.layers:  # so that the plan does not depend on what was measured; the host's time is one number
        layer.planner._average = lambda values: chosen if values.dim() else values  # type: ignore[method-assign]
    for _ in range(WARM_UP + MEASURED + 1):
        model.forward(*batch()).sum().backward()


@pytest.fixture(scope="module")
def plan(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plan as it is written."""
    folder = tmp_path_factory.mktemp("plans")
    ranks.run(2, learn, str(folder))
    return (folder / "layer-0-from-rank-0.json").read_text()


def damaged(plan: str) -> dict[str, bytes]:
    content = json.loads(plan)
    chunk = content["forward"][0]

    def with_forward(*chunks: object) -> bytes:
        return json.dumps({**content, "forward": chunks}).encode()

    return {
        "cut short": plan.encode()[: len(plan) // 2],
        "empty": b"",
        "bytes": bytes(range(256)),
        "a pickle": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94.",
        "nested": b"[" * 100_000,
        "no object": b"[1, 2]",
        "one chunk too many": with_forward(chunk, chunk, chunk),
        "not a number": with_forward(chunk, {**chunk, "expert": float("nan")}),
        "infinite": with_forward(chunk, {**chunk, "expert": float("inf")}),
        "negative": with_forward(chunk, {**chunk, "expert": -1}),
        "a word": with_forward(chunk, {**chunk, "expert": "fast"}),
        "a word for a link": with_forward(chunk, {**chunk, "dispatch": {"inter": "fast"}}),
        "weights forward": with_forward(chunk, {**chunk, "weights": 1.0}),
        "a list for a link": with_forward(chunk, {**chunk, "dispatch": [1, 2]}),
    }


@pytest.mark.distributed
def test_a_damaged_plan_is_refused_on_every_rank(ranks: RankPool, plan: str, tmp_path: Path) -> None:
    path = tmp_path / "layer-0-from-rank-0.json"
    path.write_text(plan)
    assert [kind for _, kind, _ in ranks.run(2, step, str(tmp_path))] == ["", ""]
    for name, content in damaged(plan).items():
        path.write_bytes(content)
        for rank, (seconds, kind, message) in enumerate(ranks.run(2, step, str(tmp_path))):
            assert kind == "PlanMoEConfigError", (name, rank, kind, message)
            assert str(path) in message, (name, rank, message)
            assert seconds < 8, (name, rank, seconds)
            assert rank != 0 or "delete it, or name another" in message, (name, message)


def test_a_damaged_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for content in (b"", b"\x80\x04.", b"[1]", b'{"version": 1}', b"{" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run.json"):
            load_execution(path)


def loaders(path: Path) -> list[str]:
    """Calls in a source file that may run code from a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        words = ast.unparse(node.func)
        safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        loads_torch = words == "torch.load" and not safe
        if loads_torch or words in ("pickle.load", "pickle.loads", "numpy.load", "np.load"):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_no_file_of_ours_is_loaded_in_a_way_that_runs_code() -> None:
    folders = ("planmoe_ds", "megatron_patches", "examples", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 50
    assert [call for path in sources for call in loaders(path)] == []


def test_weights_only_refuses_code(tmp_path: Path) -> None:
    """What the rule above relies on."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("code ran",)

    torch.save({"model": Evil()}, tmp_path / "rank0.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        torch.load(tmp_path / "rank0.pt", weights_only=True)
