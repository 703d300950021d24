"""Model-local functions are inlined, so that the rewrites see what is in them.

    y = my.Block(x) → the body of my.Block

Functions of planish's own domains stay: their bodies are the definitions of compressed ops.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

PLANISH = "planish"


def inline_functions(model: ir.Model) -> dict[str, int]:
    """Inline every function whose domain is not planish's."""
    if not any(_is_foreign(function) for function in model.functions.values()):
        return {}
    calls = sum(
        node.op_identifier() in model.functions and not node.domain.startswith(PLANISH)
        for node in model.graph.all_nodes()
    )
    common.InlinePass(criteria=_is_foreign)(model)
    return {"functions-inlined": calls}


def _is_foreign(function: ir.Function) -> bool:
    return not function.domain.startswith(PLANISH)
