"""Whether the cached keys or values of an attention are its own: only then may their basis change."""

from __future__ import annotations

import onnx_ir as ir


def reason_to_keep_cache(node: ir.Node, past: ir.Value | None, present: ir.Value | None) -> str | None:
    """Why what ``node`` takes as ``past`` and returns as ``present`` cannot be rotated; None if it can."""
    if past is not None and not past.is_graph_input():
        return "its cache is not an input of the graph"
    readers = [] if past is None else [each for each in past.consumers() if each is not node]
    readers += [] if present is None else list(present.consumers())
    other = next((reader for reader in readers if reader.op_type != "Shape"), None)
    return None if other is None else f"{other.op_type} reads its cache too"
