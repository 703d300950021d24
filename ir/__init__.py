"""The IR: `onnx_ir.Model` at opset 23, and what reads, writes, checks, prints and looks at it."""

from .clone import clone
from .diff import ModelDiff, diff_models
from .external import release
from .load import load
from .printer import format_model, format_node
from .save import save
from .shapes import infer_shapes
from .verify import verify

__all__ = [
    "ModelDiff",
    "clone",
    "diff_models",
    "format_model",
    "format_node",
    "infer_shapes",
    "load",
    "release",
    "save",
    "verify",
]
