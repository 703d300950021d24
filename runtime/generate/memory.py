"""How much memory generating takes, computed from the graph before anything runs.

    weights      bytes of all initializers
    packed       copies of weights that onnxruntime's kernels make in their own layout when a session starts
    cache        Σ over layers and parts of  batch · heads · tokens · size · bytes; of windows, their buffers'
    activations  the largest sum of values that are alive together in one run, and the kernels' scratch:
                 attention's scores, batch · heads · sequence · total floats

Values live from the node that makes them to the last one that reads them, in the order of the graph. Runs are
those of `generate`: the prompt in chunks, the last of which sees the whole text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from ...ir import clone
from ...ir.shapes import infer_shapes
from ...ir.views.values import integer
from .cache import cache_slots

_PACKED_INPUTS = {
    "MatMul": (1,),
    "FusedMatMul": (1,),
    "Gemm": (1,),
    "MatMulNBits": (1,),
    "MatMulInteger": (1,),
    "MatMulIntegerToFloat": (1,),
    "DynamicQuantizeMatMul": (1,),
}
"""Inputs of which kernels keep a copy of their own, by op."""
_SCORES = "GroupQueryAttention"
_FLOAT = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """In bytes.

    Attributes:
        weights: as in the file.
        packed: second copies of weights, for the kernels.
        cache: keys and values at full length.
        activations: what one run needs besides, at most.
        bytes_per_token: by which the cache grows with a token of one sequence, before windows are full.
    """

    weights: int
    packed: int
    cache: int
    activations: int
    bytes_per_token: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.packed + self.cache + self.activations

    def __str__(self) -> str:
        parts = ("weights", "packed", "cache", "activations", "total")
        sizes = ", ".join(f"{part} {getattr(self, part) / 1e6:,.1f}" for part in parts)
        return f"MB: {sizes}; {self.bytes_per_token:,} bytes of cache per token"


def memory(model: ir.Model, *, batch: int, length: int, chunk: int) -> Memory:
    """What a bound decoder needs.

    Args:
        model: not changed.
        batch: sequences.
        length: tokens of a sequence, prompt and answer together.
        chunk: tokens that are run at a time.

    Raises:
        InputError: the model has no cache.
    """
    slots = cache_slots(model)
    weights = [value for value in model.graph.initializers.values() if value.const_value is not None]
    new = min(chunk, length)
    sizes = {
        "batch_size": batch,
        "sequence_length": new,
        "past_sequence_length": length - new,
        "total_sequence_length": length,
    }
    per_token = sum(slot.bytes_per_token() for slot in slots)
    return Memory(
        weights=sum(_size(value) for value in weights),
        packed=sum(_packed(node) for node in model.graph.all_nodes()),
        cache=batch * sum(slot.capacity(length) * slot.bytes_per_token() for slot in slots),
        activations=_activations(model, sizes, {slot.present for slot in slots if slot.in_place}),
        bytes_per_token=per_token,
    )


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _packed(node: ir.Node) -> int:
    places = _PACKED_INPUTS.get(node.op_type, ())
    operands = [node.inputs[place] for place in places if place < len(node.inputs)]
    return sum(_size(value) for value in operands if value is not None and value.is_initializer())


def _activations(model: ir.Model, sizes: Mapping[str, int], elsewhere: set[str]) -> int:
    """The largest sum of what is alive at a node; ``elsewhere`` are outputs in buffers of the cache."""
    copy = clone(model)
    infer_shapes(copy)
    graph = copy.graph
    last_reader = {
        value: position for position, node in enumerate(graph) for value in node.inputs if value is not None
    }
    alive: dict[ir.Value, int] = {}
    peak = 0
    for position, node in enumerate(graph):
        for value in node.outputs:
            if value.name not in elsewhere:
                alive[value] = _bytes(value, sizes)
        peak = max(peak, sum(alive.values()) + _scratch(node, sizes))
        for value in [value for value in alive if last_reader.get(value, -1) <= position]:
            if not value.is_graph_output():
                del alive[value]
    return peak


def _bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    """Of a value at these sizes; what is not known counts as nothing."""
    if value.shape is None or value.dtype is None:
        return 0
    elements = 1
    for dim in value.shape:
        size = dim if isinstance(dim, int) else dim.evaluate(sizes)
        if not isinstance(size, int):
            return 0
        elements *= size
    return elements * value.dtype.bitwidth // 8


def _scratch(node: ir.Node, sizes: Mapping[str, int]) -> int:
    if node.op_type != _SCORES:
        return 0
    heads = integer(node, "num_heads") or 0
    return sizes["batch_size"] * heads * sizes["sequence_length"] * sizes["total_sequence_length"] * _FLOAT
