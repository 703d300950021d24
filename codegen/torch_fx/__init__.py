"""Lowering the IR to `torch.fx`: a reference that runs anywhere, in any precision, with gradients.

    module = lower(model, dtype=torch.float64)
    outputs = run(module, {"input_ids": ids, "attention_mask": mask})   # dict by graph-output name
    print(module.code)

Each IR node becomes one call of a function that has the op's exact semantics. `OPS` says which; entries
passed to `lower` take precedence, so that a target binds ops to kernels of its own.
"""

from .lower import INPUTS_KEY, NODE_KEY, OPS, VALUE_KEY, lower, run
from .registry import Integers, Lowering, OpKey, Registry, as_integers

__all__ = [
    "INPUTS_KEY",
    "NODE_KEY",
    "OPS",
    "VALUE_KEY",
    "Integers",
    "Lowering",
    "OpKey",
    "Registry",
    "as_integers",
    "lower",
    "run",
]
