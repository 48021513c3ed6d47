"""The least makespan by trying every order: slow, and independent of the solver."""

from __future__ import annotations

from collections.abc import Sequence

from planmoe_ds.scheduling import Task


def least_makespan(tasks: Sequence[Task], num_resources: int = 3) -> float:
    """Over all orders in which no task comes before one that it waits for; states seen before are not tried again."""
    best = float("inf")
    seen: set[tuple[frozenset[int], tuple[float, ...], tuple[tuple[int, float], ...]]] = set()

    def extend(done: dict[int, float], free: tuple[float, ...]) -> None:
        nonlocal best
        latest = max(done.values(), default=0.0)
        left = [0.0] * num_resources  # work that no order can avoid
        for place, task in enumerate(tasks):
            for resource, seconds in task.legs if place not in done else ():
                left[resource] += seconds
        if max(latest, *(start + work for start, work in zip(free, left, strict=True))) >= best:
            return
        if len(done) == len(tasks):
            best = latest
            return
        state = (frozenset(done), free, tuple(sorted(done.items())))
        if state in seen:
            return
        seen.add(state)
        for place, task in enumerate(tasks):
            if place not in done and all(before in done for before in task.after):
                end, now_free = run(task, max((done[before] for before in task.after), default=0.0), free)
                extend({**done, place: end}, now_free)

    extend({}, (0.0,) * num_resources)
    return best


def run(task: Task, ready: float, free: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """When what waits for the task may start, and when every resource is free again."""
    now_free = list(free)
    end = 0.0
    for resource, seconds in task.legs:
        now_free[resource] = max(ready, free[resource]) + seconds
        end = max(end, now_free[resource])
        if task.serial:
            ready = now_free[resource]
    return end + task.latency, tuple(now_free)


def makespan_of(tasks: Sequence[Task], order: Sequence[int], num_resources: int = 3) -> float:
    """Of one order."""
    done: dict[int, float] = {}
    free = (0.0,) * num_resources
    for place in order:
        task = tasks[place]
        assert all(before in done for before in task.after), f"{task} comes too early"
        done[place], free = run(task, max((done[before] for before in task.after), default=0.0), free)
    assert len(done) == len(tasks)
    return max(done.values(), default=0.0)
