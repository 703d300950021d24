"""R1: one rotation of the residual stream.

    E ← E Q        embedding tables and learned positions
    W ← W Q, b ← b Q   what writes the stream: output and down projections
    W ← Qᵀ W       what reads it, behind norms without weights: q, k, v, gate, up, lm_head

RMSNorm(x Q) = RMSNorm(x) Q for orthogonal Q, so nothing runs at inference (QuaRot, Ashkboos et al., 2024).
Preconditions: the norms are RMSNorms without weights, as `fold-norms` leaves them, and all that reads and
writes the stream is known and constant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from ..infrastructure.base import Skipped
from .change import Change, Edit
from .streams import Stream, is_norm, is_weightless, trace_stream
from .vectors import VectorFunction

Draw = Callable[[int, str], tuple[VectorFunction, tuple[str, ...]]]
"""A rotation of so many features for the change of that label, and remarks about it."""


def residual_rotations(model: ir.Model, draw: Draw) -> tuple[list[Change], list[Skipped]]:
    """R1 for every residual stream that allows it, and why others do not."""
    changes, skipped = [], []
    for stream in _residual_streams(model.graph):
        name = _name(stream)
        reason = _reason_to_skip(stream)
        if reason is not None:
            skipped.append(Skipped(f"R1 {name}", reason))
            continue
        function, remarks = draw(stream.width, f"R1 {name}")
        edits = (
            Edit(tuple(dict.fromkeys(stream.writers)), function, reads=False),
            Edit(tuple(dict.fromkeys(stream.readers)), function, reads=True),
        )
        changes.append(Change("R1", name, edits, remarks=remarks))
    return changes, skipped


def _residual_streams(graph: Iterable[ir.Node]) -> list[Stream]:
    """The streams that norms read and that have residual sums."""
    streams: list[Stream] = []
    seen: set[ir.Value] = set()
    for node in graph:
        value = node.inputs[0] if is_norm(node) else None
        if value is None or value in seen:
            continue
        stream = trace_stream(value, passes_norm=_commutes)
        if stream is not None:
            seen |= stream.values
            if stream.is_residual:
                streams.append(stream)
    return streams


def _commutes(norm: ir.Node) -> bool:
    """Whether the norm commutes with rotations."""
    return norm.op_type == "RMSNormalization" and is_weightless(norm)


def _name(stream: Stream) -> str:
    """The first constant that writes the stream: mostly the token embedding."""
    if not stream.writers:
        return "residual stream"
    return stream.writers[0].name.removesuffix(".weight")


def _reason_to_skip(stream: Stream) -> str | None:
    weighted = next((norm for norm in stream.norms if not _commutes(norm)), None)
    if weighted is not None:
        if weighted.op_type == "LayerNormalization":
            return "a LayerNorm reads the stream: fold-norms makes it an RMSNorm if it can be centred"
        return "a norm with weights reads the stream: fold-norms moves them if only linears read the norm"
    if stream.obstacles:
        return str(stream.obstacles[0])
    return Change("R1", "", _all(stream)).reason_not_to_make()


def _all(stream: Stream) -> tuple[Edit, ...]:
    return (Edit((*stream.writers, *stream.readers), lambda vectors: vectors, reads=False),)
