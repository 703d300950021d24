"""Which model this is: a hash of what it holds."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx_ir as ir

from .external import release


def content_hash(model: ir.Model) -> str:
    """SHA-256 of a graph's weights, names included: which model a file was compiled from."""
    digest = hashlib.sha256()
    for name in sorted(model.graph.initializers):
        tensor = model.graph.initializers[name].const_value
        if tensor is None:
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data)
        release(tensor)
    return f"sha256:{digest.hexdigest()}"
