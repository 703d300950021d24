"""The ``planish`` op domain: compressed ops defined once, as ONNX functions of standard ops.

A body is its op's meaning. A model that holds these ops is valid ONNX and runs wherever functions are
inlined; targets bind the same nodes to faster kernels.
"""

from .containers import container, integer_tensor, integer_values
from .definition import DOMAIN, VERSION, OpDefinition, define, inline
from .dynamic_quantized_linear import dynamic_quantized_linear
from .quantized_gather import quantized_gather
from .quantized_linear import quantized_linear
from .replace import drop_unused_initializer, replace

__all__ = [
    "DOMAIN",
    "VERSION",
    "OpDefinition",
    "container",
    "define",
    "drop_unused_initializer",
    "dynamic_quantized_linear",
    "inline",
    "integer_tensor",
    "integer_values",
    "quantized_gather",
    "quantized_linear",
    "replace",
]
