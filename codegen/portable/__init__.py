"""Standard ONNX for any runtime."""

from .portable import Portable

__all__ = ["Portable"]
