"""The last two axes swapped by way of a flat batch become one Transpose.

    Reshape(Transpose(Reshape(x, [a·b, s, d]), (0, 2, 1)), [a, b, d, s]) → Transpose(x, (0, 1, 3, 2))

with x [a, b, s, d]. torch's exporter spells the transposed keys of scaled_dot_product_attention like this at
opsets without an Attention op; the attention rewrite looks for the plain Transpose.

Preconditions: the four shapes are known to be as in the equation; symbols count as equal by name. The first
axis of the flat batch then is a·b, since a Reshape keeps the number of elements.
"""

from __future__ import annotations

import onnx_ir as ir

from ..infrastructure.rewriter import Replacement, Rule
from .graph_edits import dims, producer


class TransposeThroughFlatBatch(Rule):
    """Reshape → Transpose(0, 2, 1) → Reshape, as one Transpose(0, 1, 3, 2)."""

    name = "batched-transpose"
    roots = ("Reshape",)

    def apply(self, node: ir.Node) -> bool:
        """Rewrite ``node``, the Reshape back to four axes."""
        transpose = producer(node.inputs[0], "Transpose")
        flatten = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
        source = flatten.inputs[0] if flatten is not None else None
        if transpose is None or source is None or "perm" not in transpose.attributes:
            return False
        if tuple(transpose.attributes["perm"].as_ints()) != (0, 2, 1):
            return False
        before, flat, after = dims(source), dims(transpose.inputs[0]), dims(node.outputs[0])
        if before is None or flat is None or after is None or len(before) != 4 or None in before:
            return False
        a, b, s, d = before
        if flat[1:] != [s, d] or after != [a, b, d, s]:
            return False
        replacement = Replacement(node)
        return replacement.finish(
            replacement.op("Transpose", source, like=node.outputs[0], perm=(0, 1, 3, 2))
        )


def rules(opset: int) -> list[Rule]:
    """The rules whose results exist in this opset: all of them do."""
    del opset
    return [TransposeThroughFlatBatch()]
