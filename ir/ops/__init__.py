"""The ``planish`` op domain: compressed ops defined once, as ONNX functions of standard ops.

A body is its op's meaning. A model that holds these ops is valid ONNX and runs wherever functions are
inlined; targets bind the same nodes to faster kernels.
"""

from .containers import container, integer_tensor, integer_values, zeros_of
from .definition import DOMAIN, VERSION, OpDefinition, define, inline
from .dynamic_quantized_linear import dynamic_quantized_linear
from .hadamard_transform import factor_values, hadamard_transform
from .quantized_conv import quantized_conv
from .quantized_gather import quantized_gather
from .quantized_linear import Outliers, SecondLevel, outlier_gaps, quantized_linear
from .registry import LINEAR_OPS, definition_of, operand
from .replace import drop_unused_initializer, replace
from .static_quantized_linear import static_quantized_linear

__all__ = [
    "DOMAIN",
    "LINEAR_OPS",
    "VERSION",
    "OpDefinition",
    "Outliers",
    "SecondLevel",
    "container",
    "define",
    "definition_of",
    "drop_unused_initializer",
    "dynamic_quantized_linear",
    "factor_values",
    "hadamard_transform",
    "inline",
    "integer_tensor",
    "integer_values",
    "operand",
    "outlier_gaps",
    "quantized_conv",
    "quantized_gather",
    "quantized_linear",
    "replace",
    "static_quantized_linear",
    "zeros_of",
]
