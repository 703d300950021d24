"""R2: a rotation of every value head, undone by the output projection.

    v ← v H_h       columns of v_proj, and its bias, head by head
    o ← H_hᵀ o      rows of o_proj, each query head with the matrix of its key-value head

Softmax weights mix tokens and not channels, so nothing runs at inference (SpinQuant, Liu et al., 2024). With
``across_heads``, QuaRot's (Ashkboos et al., 2024) Hadamard transform across the heads of the output
projection's input is added: online, with its inverse in the projection.

Preconditions: between v_proj, the attention and o_proj are only ops that move elements, and nothing else
reads the values. The cached values are the rotated ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ...ir.views import AttentionBlock, Linear, attentions, linears
from ..infrastructure.base import Skipped
from .cache import reason_to_keep_cache
from .change import Change, Edit, Online, gain
from .hadamard import KroneckerHadamard, hadamard_matrix, largest_block
from .heads import Indices, NoHeads, output_rows, value_columns
from .residual import Draw
from .vectors import Vector, VectorFunction, Vectors


def value_rotations(model: ir.Model, draw: Draw, *, across_heads: bool) -> tuple[list[Change], list[Skipped]]:
    """R2 for every attention that allows it, and why others do not.

    Args:
        model: not changed.
        draw: gives the rotation of a head, the same for all heads of an attention.
        across_heads: add the online transform.
    """
    changes: list[Change] = []
    skipped: list[Skipped] = []
    found = linears(model)
    for block in attentions(model):
        change = _value_rotation(block, found, draw, across_heads)
        name = str(block.node.name) if block.v is None else block.v.name
        if isinstance(change, str):
            skipped.append(Skipped(f"R2 {name}", change))
        else:
            changes.append(change)
    return changes, skipped


def _value_rotation(
    block: AttentionBlock, found: Sequence[Linear], draw: Draw, across_heads: bool
) -> Change | str:
    """The change, or why there is none."""
    reason = reason_to_keep_cache(block.node, block.past_value, block.present_value)
    if reason is not None:
        return reason
    try:
        value, columns = value_columns(block, found)
        output, rows = output_rows(block)
    except NoHeads as unknown:
        return str(unknown)
    if len(rows) % len(columns) or rows.shape[1] != columns.shape[1]:
        return f"values have {columns.shape} heads and channels, the output projection {rows.shape}"
    function, remarks = draw(columns.shape[1], f"R2 {value.name}")
    written = [_along_output(value)]
    if value.bias is not None and value.bias_node is not None:
        written.append(Vector(value.bias_node, list(value.bias_node.inputs).index(value.bias), -1))
    edits = [
        Edit(tuple(written), _by_head(function, columns), reads=False),
        Edit((_along_input(output),), _by_head(function, rows), reads=True),
    ]
    online: tuple[Online, ...] = ()
    if across_heads:
        if np.any(rows.reshape(-1) != np.arange(rows.size)):
            return "the heads of the output projection's input are not in order"
        online = (_across(output, *rows.shape),)
        edits.append(_undone(output, online[0]))
    beside = (output.node,) if online else ()
    change = Change("R2", value.name, tuple(edits), online, beside, block.present_value, remarks)
    return change.reason_not_to_make() or change


def _along_output(linear: Linear) -> Vector:
    return Vector(linear.node, 1, 0 if linear.transposed else -1)


def _along_input(linear: Linear) -> Vector:
    return Vector(linear.node, 1, -1 if linear.transposed else 0)


def _by_head(function: VectorFunction, heads: Indices) -> VectorFunction:
    """Apply ``function`` to the channels of each head, [heads, size], and leave all others."""

    def apply(vectors: Vectors) -> Vectors:
        turned = vectors.copy()
        parts = vectors[:, heads]
        turned[:, heads] = function(parts.reshape(-1, heads.shape[1])).reshape(parts.shape)
        return turned

    return apply


def _across(output: Linear, heads: int, size: int) -> Online:
    """H ⊗ I before the output projection; in blocks of heads if their number has no Hadamard matrix."""
    transform = KroneckerHadamard(heads, (hadamard_matrix(largest_block(heads)),))
    return Online(output.node, 0, transform, trailing=size)


def _undone(output: Linear, online: Online) -> Edit:
    """The rows of the output projection, transformed like its input."""
    dtype = output.weight.dtype
    assert dtype is not None
    heads, length = online.transform.features, gain(online.transform, dtype)

    def apply(vectors: Vectors) -> Vectors:
        grouped = vectors.reshape(len(vectors), heads, online.trailing)
        return online.transform.apply(grouped, axis=1).reshape(vectors.shape) / length

    return Edit((_along_input(output),), apply, reads=True)
