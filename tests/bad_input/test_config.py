"""Bad settings: one sentence per fault in the "planmoe" section names the key, the value and what is allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from planmoe_ds import backend
from planmoe_ds.config import CompressionConfig, PlanMoEConfig, find_section, parse_config
from planmoe_ds.errors import PlanMoEConfigError
from tests.harness.ranks import RankPool

TRUE_OR_FALSE = ("boolean",)
COMMS = ("auto", "direct", "pipe")
COUNTS = ("integer of 1 or more", "list")
CODECS = ("none", "int8")
CHUNK_BYS = ("'token'", "'expert'", "'source'")
EXACTNESSES = ("'exact'", "'reordered'", "'lossy'")

# key, bad value, words that tell what is allowed
BAD_VALUES = [
    ("enabled", "yes", TRUE_OR_FALSE),
    ("enabled", 1, TRUE_OR_FALSE),
    ("enabled", None, TRUE_OR_FALSE),
    ("comm", "pip", (*COMMS, "did you mean 'pipe'?")),
    ("comm", "Direct", (*COMMS, "did you mean 'direct'?")),
    ("comm", "aut", (*COMMS, "did you mean 'auto'?")),
    ("comm", "", COMMS),
    ("comm", 3, ("string",)),
    ("comm", None, ("string",)),
    ("comm", ["pipe"], ("string",)),
    ("chunks", 0, ("1",)),
    ("chunks", -4, ("1",)),
    ("chunks", 17, ("16",)),
    ("chunks", 10**30, ("16",)),
    ("chunks", "2", ("integer",)),
    ("chunks", 2.5, ("integer",)),
    ("chunks", True, ("integer",)),
    ("chunks", None, ("integer",)),
    ("chunks", [2], ("integer",)),
    ("chunk_by", "tokens", CHUNK_BYS),
    ("chunk_by", "EXPERT", CHUNK_BYS),
    ("chunk_by", 1, CHUNK_BYS),
    ("chunk_by", None, CHUNK_BYS),
    ("compression", "int7", (*CODECS, "did you mean 'int8'?")),
    ("compression", "", CODECS),
    ("compression", 8, CODECS),
    ("compression", True, CODECS),
    ("compression", None, CODECS),
    ("compression", ["int8"], CODECS),
    ("guard", True, ()),
    ("guard", 100, ()),
    ("exactness", "exakt", EXACTNESSES),
    ("exactness", "lossless", EXACTNESSES),
    ("exactness", 1, EXACTNESSES),
    ("ranks_per_node", 0, COUNTS),
    ("ranks_per_node", -2, COUNTS),
    ("ranks_per_node", "4", COUNTS),
    ("ranks_per_node", "4,2", COUNTS),
    ("ranks_per_node", 2.5, COUNTS),
    ("ranks_per_node", True, COUNTS),
    ("ranks_per_node", [], COUNTS),
    ("ranks_per_node", [2, 0], COUNTS),
    ("ranks_per_node", [2, "2"], COUNTS),
    ("ranks_per_node", [2, None], COUNTS),
    ("ranks_per_node", [2, True], COUNTS),
    ("ranks_per_node", [2, [2]], COUNTS),
    ("ranks_per_node", {"node0": 2}, COUNTS),
    ("scheduler", "optimum", ("did you mean 'optimal'",)),
    ("scheduler", 3, ("string",)),
    ("plans", "", ("at least 1",)),
    ("plans", 3, ("string",)),
    ("max_in_flight", 0, ("greater than",)),
    ("max_in_flight", 17, ("less than",)),
    ("max_in_flight", 2.5, ("integer",)),
    ("deterministic", "yes", TRUE_OR_FALSE),
    ("deterministic", 1, TRUE_OR_FALSE),
    ("timeout_seconds", 0, ("greater than",)),
    ("timeout_seconds", -1.0, ("greater than",)),
    ("timeout_seconds", "60", ("number",)),
    ("timeout_seconds", True, ("number",)),
    ("timeout_seconds", math.nan, ()),
    ("timeout_seconds", math.inf, ()),
    ("timeout_seconds", 1e-9, ()),  # rounds to zero milliseconds, which means no bound of our own
]
BAD_COMPRESSION = [
    (direction, value, words)
    for direction in CompressionConfig.model_fields
    for value, words in (
        ("int7", (*CODECS, "did you mean 'int8'?")),
        ("INT8", CODECS),
        (8, ("string",)),
        (None, ("string",)),
    )
]
MISSPELT = {
    "enable": "enabled",
    "Enabled": "enabled",
    "com": "comm",
    "chunk": "chunks",
    "num_chunks": "chunks",
    "chunkby": "chunk_by",
    "chunk-by": "chunk_by",
    "compresion": "compression",
    "compressor": "compression",
    "gard": "guard",
    "exactnes": "exactness",
    "determinstic": "deterministic",
    "rank_per_node": "ranks_per_node",
    "schedule": "scheduler",
    "in_flight": "max_in_flight",
    "plan": "plans",
    "timeout": "timeout_seconds",
    "timeout_second": "timeout_seconds",
}
MISSPELT_DIRECTIONS = {
    "dispach": "dispatch",
    "combined": "combine",
    "gradient": "gradients",
    "grads": "gradients",
    "internode": "inter",
    "intra_node": "intra",
    "sum": "sums",
}


def refusal(section: object) -> str:
    """The sentence with which a section is refused."""
    with pytest.raises(PlanMoEConfigError) as caught:
        parse_config(section)
    return str(caught.value)


def test_every_key_is_covered() -> None:
    assert {key for key, _, _ in BAD_VALUES} == set(PlanMoEConfig.model_fields)
    assert set(MISSPELT.values()) == set(PlanMoEConfig.model_fields)
    assert set(MISSPELT_DIRECTIONS.values()) == set(CompressionConfig.model_fields)


@pytest.mark.parametrize(("key", "value", "allowed"), BAD_VALUES, ids=lambda part: str(part)[:20])
def test_bad_value(key: str, value: object, allowed: tuple[str, ...]) -> None:
    message = refusal({key: value})
    assert f'"planmoe".{key}' in message
    assert repr(value) in message
    for word in allowed:
        assert word in message


@pytest.mark.parametrize(("direction", "value", "allowed"), BAD_COMPRESSION, ids=str)
def test_bad_compression_of_one_direction(direction: str, value: object, allowed: tuple[str, ...]) -> None:
    message = refusal({"compression": {direction: value}})
    assert f'"planmoe".compression.{direction} = {value!r}' in message
    for word in allowed:
        assert word in message


@pytest.mark.parametrize(("key", "meant"), MISSPELT.items(), ids=str)
def test_misspelt_key(key: str, meant: str) -> None:
    message = refusal({key: 1})
    assert f'"planmoe".{key}: unknown key' in message
    assert f"did you mean '{meant}'?" in message
    assert all(known in message for known in PlanMoEConfig.model_fields)


@pytest.mark.parametrize(("key", "meant"), MISSPELT_DIRECTIONS.items(), ids=str)
def test_misspelt_direction(key: str, meant: str) -> None:
    message = refusal({"compression": {key: "int8"}})
    assert f'"planmoe".compression.{key}: unknown key' in message
    assert f"did you mean '{meant}'?" in message


def test_key_like_no_other_lists_the_known_ones() -> None:
    message = refusal({"zzzzzz": 1})
    assert "did you mean" not in message
    assert all(known in message for known in PlanMoEConfig.model_fields)


@pytest.mark.parametrize("section", ["yes please", "true", 1, 0, 2.0, [], ["pipe"], ()], ids=repr)
def test_section_that_is_neither_switch_nor_settings(section: object) -> None:
    message = refusal(section)
    assert '"planmoe" must be true, false or a section' in message
    assert repr(section) in message


@pytest.mark.parametrize("exactness", ["exact", "reordered"])
@pytest.mark.parametrize(
    "compression", ["int8", {"dispatch": "int8"}, {"combine": "int8"}, {"gradients": "int8"}], ids=str
)
def test_lossless_promise_with_a_lossy_codec(exactness: str, compression: object) -> None:
    message = refusal({"exactness": exactness, "compression": compression})
    assert f"exactness '{exactness}'" in message
    assert "'int8'" in message
    assert "'lossy'" in message
    assert "'none'" in message


def test_exact_with_sums_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "comm_names", lambda: ["dedup", "direct", "pipe"])
    message = refusal({"exactness": "exact", "comm": "dedup"})
    for words in ("exactness 'exact' excludes comm 'dedup'", "another order", "'reordered'", "'pipe'"):
        assert words in message
    for section in ({"comm": "dedup"}, {"comm": "dedup", "exactness": "reordered"}, {"comm": "auto"}):
        assert parse_config(section).comm == section["comm"]
    assert parse_config({"exactness": "exact", "comm": "auto"}).resolved_exactness.value == "exact"


def test_ranks_of_even_and_of_uneven_nodes() -> None:
    assert parse_config({}).ranks_per_node is None
    assert parse_config({"ranks_per_node": 4}).ranks_per_node == 4
    uneven = parse_config({"ranks_per_node": [4, 4, 2]})
    assert uneven.ranks_per_node == (4, 4, 2)
    assert parse_config(json.loads(uneven.model_dump_json(exclude_none=True))) == uneven
    assert parse_config({"ranks_per_node": (4, 2)}).ranks_per_node == (4, 2)


def test_all_problems_are_told_at_once() -> None:
    message = refusal({"chunks": 99, "comm": "pip", "chunkz": 2, "compression": {"dispatch": "int7"}})
    for key in ("chunks = 99", "comm = 'pip'", "chunkz: unknown key", "compression.dispatch = 'int7'"):
        assert f'"planmoe".{key}' in message


def test_message_says_where_the_section_stands() -> None:
    with pytest.raises(PlanMoEConfigError, match=r"^ds\.json: planmoe\.chunks = 0: "):
        parse_config({"chunks": 0}, where="ds.json: planmoe")


def test_bad_settings_are_refused_even_when_switched_off() -> None:
    assert '"planmoe".chunks = 99' in refusal({"enabled": False, "chunks": 99})


def initialize(section: object, folder: str | None = None) -> None:
    """`deepspeed.initialize` of a dense model with a "planmoe" section, from a dict or from a file."""
    import deepspeed
    import torch

    import planmoe_ds  # noqa: F401  switches the hook on

    config: Any = {"train_micro_batch_size_per_gpu": 1, "planmoe": section}
    if folder is not None:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        config = str(path)
    deepspeed.initialize(model=torch.nn.Linear(2, 2), config=config)


@pytest.mark.distributed
@pytest.mark.parametrize("as_file", [False, True], ids=["dict", "file"])
def test_every_rank_raises_from_initialize(ranks: RankPool, tmp_path: Path, as_file: bool) -> None:
    folders = [tmp_path / str(rank) for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    places = [(str(folder) if as_file else None,) for folder in folders]
    outcomes = ranks.run(2, initialize, {"chunks": "many"}, per_rank_args=places, expect_failure=True)
    assert [outcome.error for outcome in outcomes] == ["PlanMoEConfigError"] * 2
    assert all("\"planmoe\".chunks = 'many'" in outcome.message for outcome in outcomes)


@pytest.mark.distributed
def test_one_rank_with_bad_settings_does_not_hang_the_others(ranks: RankPool) -> None:
    sections = [({"chunks": 2},), ({"chunks": 99},)]
    outcomes = ranks.run(2, initialize, per_rank_args=sections, expect_failure=True, timeout=60)
    assert outcomes[1].error == "PlanMoEConfigError"
    assert outcomes[0].failed
    assert "rank 1" in outcomes[0].message
    assert "chunks" in outcomes[0].message


@pytest.mark.parametrize("key", ["planmo", "PlanMoE", "plan_moe", "planmoee"])
def test_a_misspelt_section_is_not_ignored(key: str) -> None:
    with pytest.raises(PlanMoEConfigError, match=f'unknown key "{key}".*did you mean "planmoe"'):
        find_section({"optimizer": {}, key: {"chunks": 2}}, "planmoe")


def test_other_sections_are_left_alone() -> None:
    settings = {"optimizer": {}, "planmoe": {"chunks": 2}, "zero_optimization": {}, "pipeline": {}}
    assert find_section(settings, "planmoe") == {"chunks": 2}
    assert find_section({"pipeline": {}}, "planmoe") is None


def test_chunks_by_source_need_a_number() -> None:
    with pytest.raises(PlanMoEConfigError) as error:
        parse_config({"chunks": "auto", "chunk_by": "source"})
    for words in ("chunk_by 'source' excludes chunks 'auto'", "set chunks to a number"):
        assert words in str(error.value)
