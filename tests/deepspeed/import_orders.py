"""Training in a new process that imports DeepSpeed and planmoe_ds in a given order: imports nothing of them itself."""

from __future__ import annotations

import importlib
from typing import Any

BATCH, HIDDEN = 4, 8


def train_after_imports(section: Any, order: list[str]) -> tuple[bool, float]:
    """Import what `order` says ("initialize": from deepspeed import initialize), then run the model once.

    section: of the config; None leaves it out. Returns whether planmoe was on, and the sum of the output.
    """
    initialize: Any = None
    for name in order:
        if name == "initialize":
            from deepspeed import initialize
        else:
            importlib.import_module(name)
    import torch
    from deepspeed.moe.layer import MoE

    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False  # or it compiles
    torch.manual_seed(0)
    model = _Model(torch.nn.Linear(HIDDEN, HIDDEN), MoE(HIDDEN, torch.nn.Linear(HIDDEN, HIDDEN), 4, 2, k=2))
    config = {"train_batch_size": 2 * BATCH, **({} if section is None else {"planmoe": section})}
    engine, *_ = initialize(model=model.module, config=config)
    output = model.run(torch.ones(BATCH, HIDDEN, device=engine.device))
    return hasattr(engine, "planmoe"), float(output)


class _Model:
    def __init__(self, first: Any, moe: Any) -> None:
        import torch

        self.module = torch.nn.ModuleList([first, moe])

    def run(self, tokens: Any) -> Any:
        first, moe = self.module
        output, _, _ = moe(first(tokens))
        return output.sum()
