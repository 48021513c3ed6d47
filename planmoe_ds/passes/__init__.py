"""The two passes through a layer, task by task: what each does with a chunk, whatever the order.

Expert outputs travel back either as sums, one weighted sum per token and rank or node, or, where every sum must be
the framework's own, as rows, one per route.

Shape legend: see plan.py.
"""

from planmoe_ds.passes.backward import BackwardPass, Gradients
from planmoe_ds.passes.base import ChunkGraph, LayerCall, Pass
from planmoe_ds.passes.forward import ForwardPass

__all__ = ["BackwardPass", "ChunkGraph", "ForwardPass", "Gradients", "LayerCall", "Pass"]
