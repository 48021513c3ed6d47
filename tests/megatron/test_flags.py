"""The command line: what is accepted, and every mistake, told before anything starts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_patches import model
from megatron_patches.flags import read_choice, shared_settings, with_choice, with_flags
from planmoe_ds.errors import PlanMoEConfigError
from planmoe_ds.integrations.megatron_limits import problems_of

GOOD = ["--moe-token-dispatcher", "planmoe", "--num-experts", "8", "--expert-model-parallel-size", "4"]


def megatron_parser(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The few of Megatron's arguments that matter here."""
    parser.add_argument("--moe-token-dispatcher-type", choices=["allgather", "alltoall", "flex"], default="allgather")
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--fp8")
    parser.add_argument("--cuda-graph-impl", default="none")
    parser.add_argument("--cuda-graph-scope", nargs="*")
    for flag in ("--overlap-moe-expert-parallel-comm", "--use-megatron-fsdp", "--use-checkpoint-args"):
        parser.add_argument(flag, action="store_true")
    return parser


def parse(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> argparse.Namespace:
    """As Megatron's parse_args does, patched."""
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *arguments])

    def parse_args() -> argparse.Namespace:
        return with_flags(megatron_parser)(argparse.ArgumentParser(allow_abbrev=False)).parse_args()

    return with_choice(parse_args)()


def test_planmoe_is_alltoall_to_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, [*GOOD, "--planmoe-chunks", "4", "--planmoe-compression=int8"])
    assert args.moe_token_dispatcher_type == "alltoall"
    assert args.planmoe == {"chunks": 4, "compression": "int8"}


@pytest.mark.parametrize("flag", ["--moe-token-dispatcher", "--moe-token-dispatcher-type"])
@pytest.mark.parametrize("name", ["allgather", "alltoall", "flex"])
def test_megatrons_own(monkeypatch: pytest.MonkeyPatch, flag: str, name: str) -> None:
    args = parse(monkeypatch, [flag, name])
    assert args.moe_token_dispatcher_type == name
    assert args.planmoe is None


@pytest.mark.parametrize("ending", [".json", ".yaml"])
def test_file_and_override(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str) -> None:
    if ending == ".yaml":
        pytest.importorskip("yaml")
    path = tmp_path / f"settings{ending}"
    path.write_text('{"chunks": 3, "compression": {"dispatch": "int8"}}' if ending == ".json" else "chunks: 3\n")
    args = parse(monkeypatch, [*GOOD, "--planmoe-config", str(path), "--planmoe-comm", "pipe"])
    assert args.planmoe["chunks"] == 3
    assert args.planmoe["comm"] == "pipe"


def test_json_value_of_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(monkeypatch, [*GOOD, "--planmoe-compression", '{"combine": "int8"}'])
    assert args.planmoe == {"compression": {"combine": "int8"}}


def test_nested_yaml_arguments() -> None:
    model = argparse.Namespace(moe_token_dispatcher_type="planmoe", num_moe_experts=8)
    parallel = argparse.Namespace(expert_model_parallel_size=2, tensor_model_parallel_size=4)
    args = argparse.Namespace(language_model=model, model_parallel=parallel, seq_length=8)
    read_choice(args)
    assert model.moe_token_dispatcher_type == "alltoall"
    assert args.planmoe is True  # nothing asked for: the adviser chooses
    shared = shared_settings(args)
    assert [shared[f"--{name}"] for name in ("num-experts", "tensor-model-parallel-size", "seq-length")] == list("848")


def test_nested_yaml_mistakes() -> None:
    model = argparse.Namespace(moe_token_dispatcher_type="planmoe", num_moe_experts=8, fp8="hybrid")
    args = argparse.Namespace(language_model=model, model_parallel=argparse.Namespace(expert_model_parallel_size=3))
    with pytest.raises(PlanMoEConfigError, match=r"(?s)fp8 = 'hybrid'.*size 3 does not divide --num-experts 8"):
        read_choice(args)


MISTAKES = {
    "misspelt flag": (
        [*GOOD, "--planmoe-chunk", "2"],
        "unknown argument --planmoe-chunk; did you mean --planmoe-chunks",
    ),
    "bad value": ([*GOOD, "--planmoe-chunks", "99"], "planmoe.chunks = 99"),
    "bad codec": ([*GOOD, "--planmoe-compression", "int9"], "did you mean 'int8'"),
    "setting without planmoe": (["--planmoe-chunks", "2"], "--planmoe-chunks without --moe-token-dispatcher planmoe"),
    "no MoE": (["--moe-token-dispatcher", "planmoe"], "no MoE layer in the model: give --num-experts"),
    "EP does not divide": (
        ["--moe-token-dispatcher", "planmoe", "--num-experts", "6", "--expert-model-parallel-size", "4"],
        "--expert-model-parallel-size 4 does not divide --num-experts 6",
    ),
    "fp8": ([*GOOD, "--fp8", "hybrid"], "fp8 = 'hybrid'.*or use alltoall"),
    "1F1B": ([*GOOD, "--overlap-moe-expert-parallel-comm"], "overlap_moe_expert_parallel_comm.*set planmoe's chunks"),
    "graphs": ([*GOOD, "--cuda-graph-impl", "local"], "cuda_graph_impl with scope"),
    "graphs of experts": (
        [*GOOD, "--cuda-graph-impl", "transformer_engine", "--cuda-graph-scope", "attn", "moe_router"],
        "capture only attn",
    ),
    "FSDP": ([*GOOD, "--use-megatron-fsdp"], "use_megatron_fsdp.*use the distributed optimizer"),
    "no file": ([*GOOD, "--planmoe-config", "/nowhere.json"], "--planmoe-config /nowhere.json: No such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    arguments, message = MISTAKES[name]
    with pytest.raises(PlanMoEConfigError, match=message):
        parse(monkeypatch, arguments)


def test_incompatible_options_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanMoEConfigError, match=r"(?s)fp8.*overlap_moe.*does not divide"):
        parse(
            monkeypatch,
            [*GOOD, "--fp8", "e4m3", "--overlap-moe-expert-parallel-comm", "--expert-model-parallel-size", "3"],
        )


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_bad_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text)
    with pytest.raises(PlanMoEConfigError, match="--planmoe-config"):
        parse(monkeypatch, [*GOOD, "--planmoe-config", str(path)])


def test_graphs_of_attention_alone_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    parse(monkeypatch, [*GOOD, "--cuda-graph-impl", "transformer_engine", "--cuda-graph-scope", "attn"])


def test_parser_without_the_argument() -> None:
    def bare(parser: Any) -> Any:
        return parser

    with pytest.raises(ImportError, match="no --moe-token-dispatcher-type"):
        with_flags(bare)(argparse.ArgumentParser())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recompute_modules": ["core_attn", "moe"]}, ""),
        ({"recompute_modules": ["core_attn", "moe_act"]}, "recompute 'moe'"),
        ({"offload_modules": ["attn_proj", "expert_fc1"]}, "leave the experts out"),
        ({"recompute_modules": None, "offload_modules": None}, ""),
    ],
)
def test_parts_of_experts_are_left_alone(settings: dict[str, Any], words: str) -> None:
    problems = problems_of(SimpleNamespace(**settings))
    assert len(problems) == bool(words)
    assert all(words in problem for problem in problems)


def test_a_dense_model_beside_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upcycling builds one, without --num-experts, when the job's own model is there."""
    seen: list[Any] = []
    arguments = SimpleNamespace(planmoe=True, num_experts=8)
    monkeypatch.setattr(model, "_arguments", lambda: arguments)
    name = "planmoe_ds.integrations.megatron"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(activate=lambda models, _: seen.append(models) or seen))
    build = model.activated(lambda models: models)
    build(["sparse"])
    arguments.num_experts = None
    build(["dense"])
    arguments.num_experts = 8
    build(["another"])
    assert seen == [["sparse"], ["another"]]
    arguments.num_experts = None  # as the only model it is a mistake
    model.activated(lambda models: models)(["alone"])
    assert seen[-1] == ["alone"]
