"""R3 and R4: Hadamard transforms that run with the model.

    R3:  Attention(q, k, v)  →  Attention(q H, k H, v)          after the rotary embedding
    R4:  x · W               →  (x H) · (Hᵀ W)                  down_proj, fc2

R3 leaves q·kᵀ as it is and flattens the keys that are cached: it pays where the cache is quantised. R4
flattens what a gated product or an activation makes, which no rotation of weights can reach (QuaRot, Ashkboos
et al., 2024; SpinQuant, Liu et al., 2024). The transforms are Hadamard's whatever the kind of R1 and R2, in
blocks where no Hadamard matrix of the size is known.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ...ir.views import AttentionBlock, Linear, attentions, blocks
from ...ir.views.linears import as_linear
from ...ir.views.values import input_at, static_dim
from ..infrastructure.base import Skipped
from .cache import reason_to_keep_cache
from .carried import carried
from .change import Change, Edit, Online, gain
from .hadamard import KroneckerHadamard, kronecker_hadamard, largest_block
from .streams import is_norm
from .vectors import Vector, Vectors


def key_rotations(model: ir.Model) -> tuple[list[Change], list[Skipped]]:
    """R3 for every attention that allows it, and why others do not."""
    changes: list[Change] = []
    skipped: list[Skipped] = []
    for block in attentions(model):
        name = str(block.node.name) if block.k is None else block.k.name
        reason = _reason_not_to_rotate_keys(block)
        if reason is not None or block.head_size is None:
            skipped.append(Skipped(f"R3 {name}", reason or "the size of its heads is not known"))
            continue
        transform = kronecker_hadamard(block.head_size)
        online = (Online(block.node, 0, transform), Online(block.node, 1, transform))
        beside = tuple(dict.fromkeys(each.node for each in (block.q, block.k) if each is not None))
        remarks = _remarks(transform)
        changes.append(
            Change("R3", name, online=online, beside=beside, cache=block.present_key, remarks=remarks)
        )
    return changes, skipped


def _reason_not_to_rotate_keys(block: AttentionBlock) -> str | None:
    reason = reason_to_keep_cache(block.node, block.past_key, block.present_key)
    if reason is not None:
        return reason
    if block.head_size is not None and largest_block(block.head_size) < 2:
        return f"{block.head_size} channels have no Hadamard matrix, not even in blocks"
    widths = [static_dim(input_at(block.node, index), -1) for index in (0, 1)]
    return "the widths of queries and keys are not known" if None in widths else None


def down_rotations(model: ir.Model) -> tuple[list[Change], list[Skipped]]:
    """R4 for every linear that ends an MLP, and why others do not have it."""
    changes: list[Change] = []
    skipped: list[Skipped] = []
    for linear in _down_projections(model):
        if largest_block(linear.in_features) < 2:
            reason = f"{linear.in_features} channels have no Hadamard matrix, not even in blocks"
            skipped.append(Skipped(f"R4 {linear.name}", reason))
            continue
        change = _down_rotation(linear)
        reason_not_to = change.reason_not_to_make()
        if reason_not_to is not None:
            skipped.append(Skipped(change.label, reason_not_to))
        else:
            changes.append(change)
    return changes, skipped


def _down_rotation(linear: Linear) -> Change:
    transform = kronecker_hadamard(linear.in_features)
    dtype = linear.weight.dtype
    assert dtype is not None
    length = gain(transform, dtype)

    def apply(vectors: Vectors) -> Vectors:
        return transform.apply(vectors) / length

    edit = Edit((Vector(linear.node, 1, -1 if linear.transposed else 0),), apply, reads=True)
    online = Online(linear.node, 0, transform)
    remarks = _remarks(transform)
    return Change("R4", linear.name, (edit,), (online,), (linear.node,), remarks=remarks)


def _down_projections(model: ir.Model) -> Iterator[Linear]:
    """The linears whose outputs are added to a residual stream, but for those of attentions."""
    of_attention = {block.o.node for block in attentions(model) if block.o is not None}
    seen: set[ir.Node] = set(of_attention)
    for block in blocks(model):
        for linear in _last_linears(block.branch, {block.input}):
            if linear.node not in seen:
                seen.add(linear.node)
                yield linear


def _last_linears(branch: ir.Value, stop: set[ir.Value]) -> Iterator[Linear]:
    """The linears that ``branch`` is a sum of, behind norms, biases and scaling."""
    seen, waiting = set(stop), [branch]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        linear = as_linear(node)
        width = static_dim(value, -1)
        operands = None if width is None else carried(node, width)
        if linear is not None:
            yield linear
        elif is_norm(node) and node.inputs[0] is not None:
            waiting.append(node.inputs[0])
        elif operands is not None:
            operand_values = (node.inputs[index] for index in operands.activations)
            waiting.extend(each for each in operand_values if each is not None)


def _remarks(transform: KroneckerHadamard) -> tuple[str, ...]:
    return () if transform.remark is None else (transform.remark,)
