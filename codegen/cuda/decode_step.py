"""One new token of a decoder as a module that a CUDA graph can capture: nothing changes but numbers.

    attention_mask [batch, total], lengths of caches from its shape
    →  attention_mask [batch, capacity], anything behind the text;  past_length [1] on the device

Buffers of caches are longer than what is in them, and the mask is as long as they are. Positions of keys are
counted to the buffers' end: what lies behind the text is after every query, so the mask's own comparison
hides it. Kernels read lengths from the device.

Preconditions, of a graph as `bind_cached_attention` leaves it: all its caches are written in place, and their
length is that of the mask less that of the new tokens.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator

import onnx_ir as ir
from torch import fx

from ...ir.views.masks import causal_mask
from ...ir.views.values import input_at
from ..cached_attention import KERNEL
from ..torch_fx.lower import INPUTS_KEY, VALUE_KEY
from ..torch_fx.shape import shape_of
from .cached_attention import attention_step, group_query_attention

PAST_LENGTH = "past_length"
"""The argument of a step's ``forward``: how many tokens the caches hold, [1] int64."""
_MASK, _IDS, _PAST = "attention_mask", "input_ids", "past_key_values."
_LAST, _BIAS = 5, 10
"""Operands of the kernel."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Names of the values that hold lengths of caches.

    Attributes:
        past: how many tokens are cached, [1].
        totals: as many as that and the new ones, as positions of keys are counted to.
    """

    past: str
    totals: frozenset[str]


def lengths_of(model: ir.Model) -> Lengths | str:
    """Where a bound graph has its lengths; or why it cannot be run in steps, in words."""
    kernels = [node for node in model.graph if node.op_type == KERNEL]
    written = {node.inputs[position] for node in kernels for position in (3, 4)}
    caches = [value for value in model.graph.inputs if str(value.name).startswith(_PAST)]
    if not kernels or any(value not in written for value in caches):
        return "it has caches that are not written in place"
    found = {_past_of(node) for node in kernels}
    past = found.pop()
    if past is None or found:
        return "its caches have lengths of their own"
    totals: dict[ir.Value, None] = {}
    for bias in {node.inputs[_BIAS] for node in kernels if len(node.inputs) > _BIAS} - {None}:
        where = None if bias is None else bias.producer()
        mask = causal_mask(None if where is None else input_at(where, 0))
        if mask is None or mask.past is not past:
            return "a mask counts positions from elsewhere"
        totals[mask.total] = None
    return Lengths(str(past.name), frozenset(str(value.name) for value in totals))


def _past_of(kernel: ir.Node) -> ir.Value | None:
    """Shape(attention_mask)[1] − Shape(input_ids)[1], by which the caches' lengths were bound."""
    total: ir.Value | None = kernel.inputs[_LAST]
    for op_type in ("Cast", "Expand", "Sub", "Shape"):
        node = None if total is None else total.producer()
        if node is None or node.op_type != op_type:
            return None
        total = node.inputs[0] if op_type != "Shape" else node.outputs[0]
    assert total is not None
    for node in total.consumers():
        others = [_asked(value) for value in node.inputs]
        if node.op_type == "Sub" and others == [_MASK, _IDS]:
            return node.outputs[0]
    return None


def _asked(value: ir.Value | None) -> str | None:
    """The name of the graph input whose shape a value is."""
    node = None if value is None else value.producer()
    return (
        str(node.inputs[0].name) if node is not None and node.op_type == "Shape" and node.inputs[0] else None
    )


def decode_step(module: fx.GraphModule, lengths: Lengths) -> fx.GraphModule:
    """A module that runs one token of each text and shares the weights of the whole.

    Args:
        module: lowered from the graph of `lengths_of`.
        lengths: of that graph.

    Returns:
        Its ``forward`` takes `PAST_LENGTH` besides the arguments of ``module``, and writes to the caches.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    graph.output(output)
    nodes = list(graph.nodes)
    with graph.inserting_before(nodes[0]):
        past = graph.placeholder(PAST_LENGTH)
    arguments = module.meta[INPUTS_KEY]
    mask = next(node for node in nodes if node.op == "placeholder" and node.target == arguments[_MASK])
    for node in _holding(nodes, [lengths.past]):
        node.replace_all_uses_with(past)
    for node in _holding(nodes, lengths.totals):
        with graph.inserting_before(node):
            longest = graph.call_function(shape_of, (mask,), {"start": 1, "end": 2})
            node.replace_all_uses_with(graph.call_function(operator.getitem, (longest, 0)))
    for node in graph.find_nodes(op="call_function", target=group_query_attention):
        query, key, value, past_key, past_value, _, _, *others = node.args
        node.target = attention_step
        node.args = (query, key, value, past_key, past_value, past, *others)
    graph.eliminate_dead_code()
    result = fx.GraphModule(module, graph, class_name="DecodeStep")
    result.meta.update(module.meta)
    return result


def _holding(nodes: Iterable[fx.Node], names: Iterable[str]) -> Iterator[fx.Node]:
    wanted = set(names)
    return (node for node in nodes if node.meta.get(VALUE_KEY) in wanted)
