"""Output projections that are tied to the token embedding get a weight of their own.

    MatMul(x, Transpose(table))  →  MatMul(x, lm_head.weight)

Folding a norm, or rotating, changes the two in different ways.
"""

from __future__ import annotations

import onnx_ir as ir

from ..canonicalize.weight_transposes import TIED_TO, fold_weight_transposes
from ..infrastructure.base import PassContext


def untie(model: ir.Model, ctx: PassContext) -> int:
    """Untie every tied projection in place, with a remark for each; returns how many there were."""
    tied = [node for node in model.graph if node.op_type == "MatMul" and TIED_TO in node.metadata_props]
    if not tied:
        return 0
    fold_weight_transposes(model, untie=True)
    for node in tied:
        table = node.metadata_props.pop(TIED_TO)
        weight = node.inputs[1]
        size = weight.const_value.nbytes if weight is not None and weight.const_value is not None else 0
        ctx.remark(
            node if weight is None else weight,
            f"untied from {table}, which changes in another way: the file grows by {size / 1e6:.1f} MB",
        )
    return len(tied)
