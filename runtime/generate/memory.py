"""How much memory generating takes, computed from the graph before anything runs.

    weights      bytes of all initializers
    copies       those that onnxruntime holds besides: packed ones of the weights of its products, in its
                 kernels' own layout, what it widens weights to (Cast) when it loads them, and plain ones of
                 all other weights that it does not read in place
    loading      weights + plain copies of all that are not read in place + the largest that is packed: plain
                 copies are made first, and go when they are packed
    cache        Σ over layers and parts of  batch · heads · tokens · size · bytes; of windows, their buffers'
    activations  the largest sum of values that are alive together in one run; attention's scores are none,
                 for its kernels work in tiles

Values live from the node that makes them to the last one that reads them, in the order of the graph. Runs are
those of `generate`: the prompt in chunks, the last of which sees the whole text. onnxruntime itself takes a
little for any model, which was measured once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from ...ir import clone
from ...ir.shapes import infer_shapes
from ...ir.views.values import integer
from ..session import is_read_in_place
from .cache import cache_slots

_PACKS = frozenset(
    (
        "MatMul",
        "FusedMatMul",
        "Gemm",
        "MatMulNBits",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    )
)
"""Ops whose kernels keep their second input in a layout of their own."""
_SCALED = "MatMulNBits"
"""Packs its scales, too, and as many sums of blocks."""
_RUNTIME = 20_000_000
"""Bytes that onnxruntime 1.31 takes for a session of one small model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """In bytes.

    Attributes:
        weights: as in the file.
        copies: second copies of weights while running.
        loading: weights and copies at the peak of opening the model.
        prefill: weights and copies of the second set of kernels that ``fast_prefill`` asks for.
        cache: keys and values at full length.
        activations: what one run needs besides, at most.
        bytes_per_token: by which the cache grows with a token of one sequence, before windows are full.
    """

    weights: int
    copies: int
    loading: int
    prefill: int
    cache: int
    activations: int
    bytes_per_token: int

    @property
    def total(self) -> int:
        """At its peak."""
        running = self.weights + self.copies + self.prefill + self.cache + self.activations
        return _RUNTIME + max(self.loading, running)

    def __str__(self) -> str:
        parts = ("weights", "copies", "prefill", "cache", "activations", "loading", "total")
        sizes = ", ".join(f"{part} {getattr(self, part) / 1e6:,.1f}" for part in parts)
        return f"MB: {sizes}; {self.bytes_per_token:,} bytes of cache per token"


def memory(
    model: ir.Model, *, batch: int, length: int, chunk: int, prefill: ir.Model | None = None
) -> Memory:
    """What a bound decoder needs.

    Args:
        model: not changed.
        batch: sequences.
        length: tokens of a sequence, prompt and answer together.
        chunk: tokens that are run at a time.
        prefill: the same model, bound for prompts, if they have kernels of their own; not changed.

    Raises:
        InputError: the model has no cache.
    """
    slots = cache_slots(model)
    new = min(chunk, length)
    sizes = {
        "batch_size": batch,
        "sequence_length": new,
        "past_sequence_length": length - new,
        "total_sequence_length": length,
    }
    weights, copies, loading = _weights(model)
    elsewhere = {slot.present for slot in slots if slot.in_place}
    return Memory(
        weights=weights,
        copies=copies,
        loading=loading,
        prefill=0 if prefill is None else _besides(prefill, model),
        cache=batch * sum(slot.capacity(length) * slot.bytes_per_token() for slot in slots),
        activations=_activations(model if prefill is None else prefill, sizes, elsewhere),
        bytes_per_token=sum(slot.bytes_per_token() for slot in slots),
    )


def _weights(model: ir.Model) -> tuple[int, int, int]:
    """Bytes of weights, of their copies while running, and of both while loading."""
    held = plain = largest = 0
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    for value in values:
        casts = [node for node in value.consumers() if node.op_type == "Cast"]
        wide = sum(_widened(node, value) for node in casts)
        packed = sum(_packed(node, value, _size(value)) for node in value.consumers())
        packed += sum(
            _packed(reader, node.outputs[0], _widened(node, value))
            for node in casts
            for reader in node.outputs[0].consumers()
        )
        copied = 0 if is_read_in_place(value) else _size(value)
        held += wide + packed if wide else packed or copied
        plain += copied + wide
        largest = max(largest, packed)
    total = sum(_size(value) for value in values)
    return total, held, total + plain + largest


def _besides(other: ir.Model, model: ir.Model) -> int:
    """Bytes that another session adds: weights that are not the same arrays, copies, and its own."""
    known = {id(value.const_value) for value in model.graph.initializers.values()}
    own = [value for value in other.graph.initializers.values() if id(value.const_value) not in known]
    return sum(_size(value) for value in own) + _weights(other)[1] + _RUNTIME


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _widened(cast: ir.Node, value: ir.Value) -> int:
    """Bytes of a weight in the type that it is cast to."""
    wide = ir.DataType(integer(cast, "to") or 0)
    return 0 if value.const_value is None else value.const_value.size * wide.bitwidth // 8


def _packed(node: ir.Node, value: ir.Value, size: int) -> int:
    """Bytes that a reader of a weight of this size keeps of it in a layout of its own."""
    if node.op_type not in _PACKS or node.inputs[1] is not value:
        return 0
    scales = node.inputs[2] if node.op_type == _SCALED else None
    return size + (0 if scales is None else 2 * _size(scales))


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
        peak = max(peak, sum(alive.values()))
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
