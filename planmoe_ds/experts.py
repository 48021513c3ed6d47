"""This rank's experts, run on a chunk's rows as the framework would run them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from planmoe_ds.equal_experts import recognise
from planmoe_ds.grouped import GroupedExperts, GroupedGraph
from planmoe_ds.plan import ExpertLayout


class Experts(ABC):
    """What runs on a chunk's rows.

    takes_weights: experts multiply by their routes' weights themselves, which run() then gets; else that is done where
    outputs are added up. grouped: the same experts as one grouped GEMM per projection, where they allow it.
    """

    takes_weights: bool
    grouped: GroupedExperts | None = None

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of all local experts, each once, in a fixed order."""

    @abstractmethod
    def run(self, buffer: torch.Tensor, layout: ExpertLayout, weights: torch.Tensor | None) -> torch.Tensor:
        """Buffer [rows, H] in `layout`, weights [rows] or None -> outputs [rows, H] in the same places."""

    def members(self) -> tuple[nn.Module, ...]:
        """The modules that find_groups() looks at; none where experts cannot be grouped."""
        return ()

    def find_groups(self) -> GroupedExperts | None:
        """What `grouped` may be."""
        return None

    def with_groups(self, grouped: GroupedExperts) -> Experts:
        """The same experts, with what find_groups() found."""
        return replace(self, grouped=grouped)  # type: ignore[type-var]

    def run_grouped(
        self, buffer: torch.Tensor, layout: ExpertLayout, weights: torch.Tensor | None, *, keep: bool
    ) -> GroupedGraph | None:
        """run() as grouped GEMMs without autograd's help, if the experts, their device and the layout allow it."""
        if self.grouped is None or layout.ends is None or not self.grouped.can_run(buffer):
            return None
        return self.grouped.run(buffer, layout.ends, weights, keep=keep)


@dataclass(frozen=True)
class LocalExperts(Experts):
    """The experts of one layer on this rank.

    modules: one per local expert, called with [1, 1, rows, H] and returning the same shape (or a tuple that starts
    with it). padded: the framework's own runner, [P, L, C, H] -> the same shape.
    """

    modules: Sequence[nn.Module]
    padded: Callable[[torch.Tensor], torch.Tensor]
    takes_weights: bool = False
    grouped: GroupedExperts | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of all local experts, each once, in a fixed order."""
        if self.grouped is not None:
            return self.grouped.parameters
        found = {
            id(parameter): parameter for module in self.modules for parameter in module.parameters()
        }  # experts may share parameters
        return [parameter for parameter in found.values() if parameter.requires_grad]

    def members(self) -> tuple[nn.Module, ...]:
        """See Experts."""
        return tuple(self.modules)

    def find_groups(self) -> GroupedExperts | None:
        """See Experts."""
        return recognise(self.modules)

    def run(self, buffer: torch.Tensor, layout: ExpertLayout, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Buffer [rows, H] in `layout` -> the experts' outputs [rows, H] in the same places."""
        assert weights is None
        if layout.padded_shape is not None:
            output = self.padded(buffer.reshape(*layout.padded_shape, buffer.shape[-1]))
            return _checked(output, buffer.shape[0], buffer.shape[1], self.modules[0])
        pieces = buffer.split(list(layout.rows_of_expert))
        outputs = [_run_one(module, rows) for module, rows in zip(self.modules, pieces, strict=True)]
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _run_one(module: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """One expert on its rows.

    Without rows it sees one zero row, as it would an empty capacity slot, and gets zero gradients: optimizers and
    gradient hooks expect every expert to take part in every step.
    """
    num_rows, hidden = rows.shape
    if num_rows == 0:
        empty_slot = rows.new_zeros((1, hidden))
        return _checked(module(empty_slot.reshape(1, 1, 1, hidden)), 1, hidden, module)[:0]
    return _checked(module(rows.reshape(1, 1, num_rows, hidden)), num_rows, hidden, module)


def _checked(output: object, num_rows: int, hidden: int, module: nn.Module) -> torch.Tensor:
    if isinstance(output, tuple):  # DeepSpeed ignores a bias that an expert returns apart
        output = output[0]
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"expert {type(module).__name__} must return a tensor, got {type(output).__name__}")
    if output.numel() != num_rows * hidden:
        raise ValueError(
            f"expert {type(module).__name__} must return its input's shape ({num_rows} rows of {hidden} values), "
            f"got {tuple(output.shape)}"
        )
    return output.reshape(num_rows, hidden)


def check_no_foreign_leaves(output: torch.Tensor, known: Sequence[torch.Tensor], layer: int) -> None:
    """Raise ValueError when `output` depends on a trainable tensor outside `known`: its gradient would be lost."""
    known_ids = {id(tensor) for tensor in known}
    seen: set[object] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                f"MoE layer {layer}: an expert recomputes its activations with reentrant checkpointing, which needs "
                ".backward() of the whole graph; planmoe runs backward chunk by chunk. Use use_reentrant=False inside "
                "the expert, or checkpoint the block around the MoE layer"
            )
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known_ids:
            raise ValueError(
                f"MoE layer {layer}: an expert uses a trainable tensor of shape {tuple(leaf.shape)} that is not among "
                "its own parameters, so planmoe would lose its gradient; register it on the expert module "
                "(self.weight = that parameter)"
            )
        stack += [edge[0] for edge in node.next_functions]
