"""What can be asked of the emulated cluster, and what is refused."""

from __future__ import annotations

import pytest

from benchmarks.cluster.__main__ import parse_arguments
from benchmarks.cluster.spec import ClusterSpec, bits_per_second


def test_rates() -> None:
    assert bits_per_second("400mbit") == 4e8
    assert bits_per_second("2.5gbit") == 2.5e9


@pytest.mark.parametrize("rate", ["400", "fast", "0mbit", "-1gbit", "4 mbit", "400Mbps"])
def test_bad_rates(rate: str) -> None:
    with pytest.raises(ValueError, match="expected a positive number and kbit, mbit or gbit"):
        ClusterSpec(ranks_per_node=(1, 1), inter=rate)


@pytest.mark.parametrize(
    ("counts", "words"), [((), "has 0 nodes"), ((1,) * 201, "201 nodes"), ((2, 0), "at least one")]
)
def test_bad_nodes(counts: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ClusterSpec(ranks_per_node=counts)


def test_places_of_ranks() -> None:
    spec = ClusterSpec(ranks_per_node=(3, 1, 2))
    assert spec.world_size == 6
    assert spec.node_of_rank == [0, 0, 0, 1, 2, 2]
    assert ClusterSpec.from_json(spec.to_json()) == spec
    assert ClusterSpec.even(2, 3, None, "1gbit").ranks_per_node == (3, 3)


def test_command_line() -> None:
    line = "run --nodes 3 --ranks-per-node 2 --inter 1gbit --intra none --timeout 9 -- prog --nodes 7"
    spec, program, timeout = parse_arguments(line.split())
    assert spec == ClusterSpec(ranks_per_node=(2, 2, 2), inter="1gbit", intra=None)
    assert (program, timeout) == (["prog", "--nodes", "7"], 9)
    spec, _, _ = parse_arguments(["run", "--ranks-per-node", "4,1", "--", "prog"])
    assert spec.ranks_per_node == (4, 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("run", "nothing to run"),
        ("run --nodes 3 --ranks-per-node 2,2 -- p", "--nodes is 3, --ranks-per-node lists 2"),
        ("run --inter quick -- p", "rate is 'quick'"),
        ("run --ranks-per-node two -- p", "two"),
    ],
)
def test_bad_command_lines(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(line.split())
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
