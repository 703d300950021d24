"""onnxruntime on the CPU: for each op, the kernel that is fastest here."""

from .target import OnnxruntimeCpu

__all__ = ["OnnxruntimeCpu"]
