"""The IR: `onnx_ir.Model` at opset 23, and what reads, writes, checks, prints and looks at it."""

from .clone import clone
from .external import release
from .load import load
from .printer import format_model, format_node
from .save import save
from .shapes import infer_shapes
from .verify import verify

__all__ = [
    "clone",
    "format_model",
    "format_node",
    "infer_shapes",
    "load",
    "release",
    "save",
    "verify",
]
