"""The number of chunks: what two timings say about others, what is chosen, and the words for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planmoe_ds.choose_chunks import CANDIDATES, LayerCosts, choose_schedule, costs_at
from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts


def chunk_of(work: float, exchange: float, num_chunks: int, anew: float = 0.0) -> ChunkCosts:
    """One of `num_chunks` chunks of a layer whose experts and exchanges take so long; every task starts anew."""
    leg = ExchangeCosts(0.1 * exchange / num_chunks + anew, exchange / num_chunks + anew)
    return ChunkCosts(anew, leg, anew, work / num_chunks + anew, anew, leg, anew)


def trials_of(work: float, exchange: float, anew: float = 0.0) -> dict[int, LayerCosts]:
    """What would be timed at one and at four chunks."""
    found = {}
    for num_chunks in (1, 4):
        chunk = chunk_of(work, exchange, num_chunks, anew)
        weights = replace(chunk, weights=chunk.expert)
        found[num_chunks] = LayerCosts([chunk] * num_chunks, [weights] * num_chunks)
    return found


@pytest.mark.parametrize("num_chunks", CANDIDATES)
def test_two_timings_tell_about_all_numbers_of_chunks(num_chunks: int) -> None:
    found = costs_at(trials_of(3.0, 2.0, 0.05), num_chunks)
    expected = chunk_of(3.0, 2.0, num_chunks, 0.05)
    assert len(found.forward) == num_chunks
    assert found.forward[0].expert == pytest.approx(expected.expert)
    assert found.forward[0].combine.inter == pytest.approx(expected.combine.inter)
    assert found.backward is not None
    assert found.backward[-1].weights == pytest.approx(expected.expert)


def test_noise_makes_no_negative_costs() -> None:
    noisy = trials_of(1.0, 1.0)
    noisy[4] = LayerCosts([chunk_of(9.0, 0.001, 4)] * 4, None)  # cut in four it took longer, exchanges next to nothing
    for num_chunks in CANDIDATES:
        found = costs_at(noisy, num_chunks)
        assert found.backward is None
        assert 0 <= found.forward[0].expert <= 1.0 + 1e-9
        assert found.forward[0].dispatch.inter >= 0


def test_equal_work_and_exchange_are_cut() -> None:
    found = choose_schedule(trials_of(1.0, 0.5, 0.001), CANDIDATES)
    assert found.num_chunks > 1
    assert found.seconds[found.num_chunks, found.scheduler] < 0.8 * found.seconds[1, "sequential"]
    assert "1 chunk would lose" in found.reason


def test_what_every_chunk_costs_anew_keeps_layers_whole() -> None:
    found = choose_schedule(trials_of(0.5, 0.5, 1.0), CANDIDATES, "optimal")
    assert found.num_chunks == 1
    assert "2 chunks would lose" in found.reason


def test_nothing_to_hide_leaves_all_off() -> None:
    found = choose_schedule(trials_of(1.0, 0.001), CANDIDATES)
    assert (found.num_chunks, found.scheduler) == (1, "sequential")
    assert "8 chunks would gain less than 3%" in found.reason
    assert "optimal order would gain less than 3%" in found.reason


def test_a_host_that_starts_tasks_too_slowly_keeps_layers_whole() -> None:
    trials = trials_of(1.0, 0.5, 0.001)
    busy = {num_chunks: replace(costs, host=1.0 + 4.0 * num_chunks) for num_chunks, costs in trials.items()}
    assert choose_schedule(trials, CANDIDATES).num_chunks > 1
    found = choose_schedule(busy, CANDIDATES)
    assert found.num_chunks == 1
    assert found.seconds[8, "optimal"] == pytest.approx(1.0 + 4.0 * 8)
    idle = {num_chunks: replace(costs, host=0.1) for num_chunks, costs in trials.items()}
    assert choose_schedule(idle, CANDIDATES).seconds == choose_schedule(trials, CANDIDATES).seconds


def test_only_the_order_is_open() -> None:
    four = {4: trials_of(1.0, 1.0)[4]}
    found = choose_schedule(four, (4,))
    assert {num_chunks for num_chunks, _ in found.seconds} == {4}
    assert {name for _, name in found.seconds} == {"pipelined", "optimal"}
    assert choose_schedule(four, (4,), "sequential").scheduler == "sequential"


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="nothing to choose from"):
        choose_schedule({}, CANDIDATES)
    with pytest.raises(ValueError, match="nothing to choose from"):
        choose_schedule(trials_of(1, 1), ())
