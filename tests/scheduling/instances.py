"""Random task graphs, small enough to try every order."""

from __future__ import annotations

import random

from planmoe_ds.scheduling import ChunkCosts, ExchangeCosts, Kind, Resource, Task, TaskGraph, layer_graph


def random_chunks(rng: random.Random, num_chunks: int, *, backward: bool, links: int = 2) -> list[ChunkCosts]:
    """Unequal chunks with whole numbers of seconds, zeros among them."""

    def exchange() -> ExchangeCosts:
        return ExchangeCosts(
            intra=rng.randint(0, 6) if links == 2 else 0,
            inter=rng.randint(0, 9),
            serial=links == 2 and rng.random() < 0.2,
            latency=rng.choice([0, 0, 0, 1, 2]),
        )

    def chunk() -> ChunkCosts:
        seconds = [rng.choice([0, rng.randint(1, 3)]) for _ in range(4)]
        weights = rng.randint(0, 6) if backward else None
        return ChunkCosts(
            seconds[0], exchange(), seconds[1], rng.randint(0, 8), seconds[2], exchange(), seconds[3], weights
        )

    chunks = [chunk() for _ in range(num_chunks)]
    if rng.random() < 0.2:
        chunks = [chunks[0]] * num_chunks
    return chunks


def random_layer(rng: random.Random) -> TaskGraph:
    """One or two chunks, forward or backward, over one or two classes of links, sometimes one chunk in flight."""
    chunks = random_chunks(rng, rng.randint(1, 2), backward=rng.random() < 0.5, links=rng.randint(1, 2))
    return layer_graph(chunks, max_in_flight=rng.choice([None, None, 1]))


def random_graph(rng: random.Random) -> TaskGraph:
    """Up to nine tasks on two or three resources that wait for each other in any way; exchanges use both links."""
    tasks: list[Task] = []
    num_resources = rng.choice([2, 3])
    exchanges = num_resources == 3 and rng.random() < 0.5
    for place in range(rng.randint(1, 9)):
        after = tuple(before for before in range(place) if rng.random() < 0.25)
        on_links = rng.random() < 0.5
        if exchanges and on_links:
            legs = ((Resource.INTRA, rng.randint(0, 6)), (Resource.INTER, rng.randint(0, 6)))
            tasks.append(Task(Kind.DISPATCH, place, legs, after, serial=rng.random() < 0.3))
        else:
            resource = Resource.COMPUTE if exchanges else Resource(rng.randrange(num_resources))
            legs_of_one = ((resource, rng.randint(0, 9)),)
            tasks.append(Task(Kind.EXPERT, place, legs_of_one, after, latency=rng.choice([0, 0, 1])))
    return TaskGraph(tuple(tasks))
