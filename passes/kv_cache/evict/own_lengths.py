"""Let every layer of a cache have a length of its own, as it has where layers keep different tokens.

    mask = (key ≤ query) ∧ attention_mask          positions of the one text that all layers cache
    →  maskᵢ = (key ≤ query),  0 ≤ key < cache_lengthsᵢ + sequence,  query = cache_lengthsᵢ + 0, 1, …

``cache_lengths`` [layers] int64 is a new input. What a layer still holds are tokens of the past, so all of
them may be seen. Where a token stood in the text is in its rotated key, and ``position_ids`` go on counting.

Preconditions: raised layers; positions come by ``position_ids``; masks hide the future and padding, nothing
else (see `check_masks`). Padding cannot be told any more: texts of a batch have one length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ....ir.errors import PassError
from ....ir.graph_builder import GraphBuilder
from ....ir.views.caches import LENGTHS, CachedLayer
from ....ir.views.masks import causal_mask

_MASK = "attention_mask"
_MASK_INPUT = 3


def give_own_lengths(model: ir.Model, layers: Sequence[CachedLayer]) -> None:
    """Rewrite the masks of a decoder in place.

    Raises:
        PassError: a precondition does not hold.
    """
    inputs = {str(value.name): value for value in model.graph.inputs}
    if LENGTHS in inputs:
        raise PassError(f"evict: the model has an input {LENGTHS!r} already", hint="evict once")
    for name in ("input_ids", "position_ids"):
        if name not in inputs:
            raise PassError(
                f"evict: the model has no input {name!r}",
                hint="tokens that stay must keep their positions: trace the model with position_ids",
            )
    lengths = ir.val(LENGTHS, dtype=ir.DataType.INT64, shape=[len(layers)])
    model.graph.inputs.append(lengths)
    build = GraphBuilder(LENGTHS)
    masks = _masks(build, lengths, inputs["input_ids"], len(layers))
    for value in build.initializers:
        model.graph.register_initializer(value)
    model.graph.insert_before(model.graph[0], build.nodes)
    for layer, mask in zip(layers, masks, strict=True):
        layer.attention.replace_input_with(_MASK_INPUT, mask)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    if not inputs[_MASK].uses():
        model.graph.inputs.remove(inputs[_MASK])


def check_masks(layers: Sequence[CachedLayer]) -> None:
    """Refuse masks that hide more than the future and padding.

    Raises:
        PassError: says which.
    """
    for layer in layers:
        _check_mask(layer)


def _check_mask(layer: CachedLayer) -> None:
    mask = causal_mask(layer.attention.inputs[_MASK_INPUT])
    if mask is None:
        found = "its mask is not known to hide the future"
    elif mask.window is not None:
        found = f"its mask has a window of {mask.window} tokens, beyond which nothing is seen anyway"
    elif any(other.name != _MASK or not other.is_graph_input() for other in mask.others):
        found = "its mask hides more than the future and padding"
    else:
        return
    raise PassError(f"evict: past_key_values.{layer.index}: {found}")


def _masks(build: GraphBuilder, lengths: ir.Value, ids: ir.Value, layers: int) -> list[ir.Value]:
    """[1, 1, sequence, past + sequence] boolean, one for each layer."""
    zero, one = (build.constant(np.array(number, np.int64), f"{number}") for number in (0, 1))
    to_row = build.constant(np.array([0, 1, 2]), "row")
    to_column = build.constant(np.array([0, 1, 3]), "column")
    new = build.op("Squeeze", build.op("Shape", ids, start=1, end=2))
    steps = build.op("Range", zero, new, one)
    masks = []
    for index in range(layers):
        past = build.op(
            "Gather", lengths, build.constant(np.array(index, np.int64), f"layer.{index}"), axis=0
        )
        keys = build.op("Unsqueeze", build.op("Range", zero, build.op("Add", past, new), one), to_row)
        queries = build.op("Unsqueeze", build.op("Add", steps, past), to_column)
        keys.shape, queries.shape = ir.Shape([1, 1, 1, None]), ir.Shape([1, 1, None, 1])
        keys.type = queries.type = ir.TensorType(ir.DataType.INT64)
        masks.append(build.op("LessOrEqual", keys, queries))
        masks[-1].type, masks[-1].shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1, 1, None, None])
    return masks
