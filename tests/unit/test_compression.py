"""The config's "compression": short forms, precedence, what is refused."""

from __future__ import annotations

import json

import pytest

from planmoe_ds.compression import DIRECTIONS, CompressionConfig, Links
from planmoe_ds.config import parse_config
from planmoe_ds.errors import PlanMoEConfigError


def ways(compression: object) -> dict[str, tuple[str, str]]:
    """(inter, intra) by direction."""
    parsed = parse_config({"compression": compression}).compression
    assert isinstance(parsed, CompressionConfig)
    inside = parsed.on_one_node()
    assert [inside.links(way) for way in DIRECTIONS] == [Links("none", parsed.links(way).intra) for way in DIRECTIONS]
    return {way: (parsed.links(way).inter, parsed.links(way).intra) for way in DIRECTIONS}


@pytest.mark.parametrize(
    ("compression", "dispatch", "combine", "gradients"),
    [
        ("int8", ("int8", "int8"), ("int8", "int8"), ("int8", "int8")),
        ("zfp:4", ("zfp:4", "zfp:4"), ("zfp:4", "zfp:4"), ("zfp:4", "zfp:4")),
        ({}, ("none", "none"), ("none", "none"), ("none", "none")),
        ({"inter": "int8"}, ("int8", "none"), ("int8", "none"), ("int8", "none")),
        ({"dispatch": "fp8"}, ("fp8", "fp8"), ("none", "none"), ("none", "none")),
        (
            {"inter": "hadamard_int8", "intra": "none", "gradients": "int8"},
            ("hadamard_int8", "none"), ("hadamard_int8", "none"), ("int8", "int8"),
        ),
        (
            {"inter": "int8", "combine": {"intra": "fp8"}, "gradients": {"inter": "none"}},
            ("int8", "none"), ("int8", "fp8"), ("none", "none"),
        ),
        ({"dispatch": "lossless"}, ("lossless", "lossless"), ("none", "none"), ("none", "none")),
    ],
    ids=str,
)  # fmt: skip
def test_precedence(
    compression: object, dispatch: tuple[str, str], combine: tuple[str, str], gradients: tuple[str, str]
) -> None:
    assert ways(compression) == {"dispatch": dispatch, "combine": combine, "gradients": gradients}


def test_sums_are_raw_unless_told_otherwise() -> None:
    assert CompressionConfig.everywhere("int8").sums == "none"
    assert parse_config({"compression": {"inter": "int8", "sums": "int8"}}).compression.sums == "int8"


def test_auto_is_lossy_and_survives_a_round_trip() -> None:
    config = parse_config({"compression": "auto", "guard": {}})
    assert config.compression == "auto"
    assert config.resolved_exactness.value == "lossy"
    for exactness in ("exact", "reordered"):
        assert parse_config({"compression": "auto", "exactness": exactness}).resolved_exactness.value == exactness
    assert parse_config(json.loads(config.model_dump_json(exclude_none=True))) == config
    section = parse_config({"compression": {"gradients": {"inter": "int8"}, "sums": "bf16"}})
    assert parse_config(json.loads(section.model_dump_json(exclude_none=True))) == section
    assert section.compression.links("gradients") == Links("int8", "none")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"compression": "zfp:40"}, ["the rate of zfp is '40'", "from 1 to 32"]),
        ({"compression": {"inter": "zfp:0.5"}}, ['"planmoe".compression.inter', "from 1 to 32"]),
        ({"compression": "int8:3"}, ["takes no setting"]),
        ({"compression": {"dispatch": {"inter": "int7"}}}, ["compression.dispatch.inter = 'int7'", "'int8'?"]),
        ({"compression": {"dispatch": {"between": "int8"}}}, ["compression.dispatch.between: unknown key", "inter"]),
        ({"compression": {"interr": "int8"}}, ["compression.interr: unknown key", "'inter'?"]),
        ({"compression": {"sums": 8}}, ["compression.sums = 8", "must be a string, the name of a codec"]),
        ({"compression": "int8", "exactness": "exact"}, ["excludes lossy codecs", "'int8'", "'auto'"]),
        ({"guard": {"interval": 0}}, ['"planmoe".guard.interval = 0', "greater than or equal to 1"]),
        ({"guard": {"max_error": 0}}, ["guard.max_error = 0", "greater than 0"]),
        ({"guard": {"max_error": "small"}}, ["guard.max_error = 'small'", "number"]),
        ({"guard": {"intervall": 5}}, ["guard.intervall: unknown key", "'interval'?"]),
        ({"guard": True}, ['"planmoe".guard = True']),
    ],
    ids=str,
)
def test_refusals(section: dict[str, object], words: list[str]) -> None:
    with pytest.raises(PlanMoEConfigError) as caught:
        parse_config(section)
    for word in words:
        assert word in str(caught.value)


def test_lossless_may_be_exact() -> None:
    for compression in ("lossless", {"inter": "lossless", "sums": "lossless"}, {"dispatch": "lossless"}):
        assert parse_config({"compression": compression, "exactness": "exact"}).exactness is not None
        assert parse_config({"compression": compression}).resolved_exactness.value == "reordered"
