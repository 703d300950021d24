"""Centring: what writes the input of LayerNorms loses its mean, and the LayerNorms become RMSNorms.

    LayerNorm(x) = RMSNorm(x − m(x)),  m(x) = mean over the channels
    x = Σ writers  →  x − m(x) = Σ (writer − m(writer))

Every vector w that enters the stream, a row of an embedding table, a weight's row along its outputs, a bias,
becomes w − m(w). Scaling, adding and moving vectors commute with that (SliceGPT, Ashkboos et al., 2024).
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from ...ir.views.values import input_at
from ..infrastructure.base import PassContext
from .streams import Stream, norm_name, trace_stream
from .vectors import Vectors, change, reason_not_to_change


def center_streams(norms: Iterable[ir.Node], ctx: PassContext) -> dict[str, int]:
    """Centre the streams that ``norms`` read, in place; returns the counts of streams and norms changed."""
    statistics = {"streams-centred": 0, "layer-norms-made-rms": 0}
    seen: set[ir.Value] = set()
    for norm in norms:
        value = norm.inputs[0]
        if norm.op_type != "LayerNormalization" or value is None or value in seen:
            continue
        stream = trace_stream(value, passes_norm=lambda _: False)
        if stream is None:
            ctx.remark(norm_name(norm), "stays a LayerNorm: the width of its input is not known")
            continue
        seen |= stream.values
        reason = _reason_not_to_center(stream)
        if reason is not None:
            ctx.remark(norm_name(norm), f"stays a LayerNorm: {reason}")
            continue
        change(stream.writers, _without_mean)
        statistics["streams-centred"] += 1
        statistics["layer-norms-made-rms"] += sum(_make_rms(each, ctx) for each in stream.norms)
    return statistics


def _without_mean(vectors: Vectors) -> Vectors:
    centred: Vectors = vectors - vectors.mean(axis=1, keepdims=True)
    return centred


def _reason_not_to_center(stream: Stream) -> str | None:
    if stream.obstacles:
        return str(stream.obstacles[0])
    if stream.readers:
        return f"{stream.readers[0].name} reads the stream without a norm"
    rms = next((norm for norm in stream.norms if norm.op_type == "RMSNormalization"), None)
    if rms is not None:
        return f"the RMSNorm {norm_name(rms)} reads the stream too"
    if not any(map(_can_be_rms, stream.norms)):
        return "its bias could not be folded"
    return reason_not_to_change(set(stream.writers))


def _can_be_rms(norm: ir.Node) -> bool:
    """RMSNormalization has no bias, and does not return the mean."""
    returns_more = any(output.uses() or output.is_graph_output() for output in norm.outputs[1:])
    return input_at(norm, 2) is None and not returns_more


def _make_rms(norm: ir.Node, ctx: PassContext) -> bool:
    if not _can_be_rms(norm):
        ctx.remark(norm_name(norm), "stays a LayerNorm: its bias could not be folded, or its mean is read")
        return False
    norm.resize_inputs(2)
    norm.resize_outputs(1)
    norm.op_type = "RMSNormalization"
    return True
