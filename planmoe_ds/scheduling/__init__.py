"""In which order a layer's tasks run: the task graph, its exact solver, and the schedulers, one file each.

No torch in here: costs in, ordered tasks out.
"""

from planmoe_ds.scheduling.abstract import AbstractScheduler
from planmoe_ds.scheduling.graph import ChunkCosts, ExchangeCosts, Kind, Resource, Task, TaskGraph, layer_graph
from planmoe_ds.scheduling.solver import Schedule, solve, timetable

__all__ = [
    "AbstractScheduler",
    "ChunkCosts",
    "ExchangeCosts",
    "Kind",
    "Resource",
    "Schedule",
    "Task",
    "TaskGraph",
    "layer_graph",
    "solve",
    "timetable",
]
