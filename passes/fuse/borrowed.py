"""Rewrites that onnxscript's rule library has already, run by planish's driver.

    Conv(Pad(x)) with zeros in the spatial axes              →  Conv(x) with wider pads
    Relu(Relu(x)), Relu(Clip(x)), Clip(Relu(x)), Clip(Clip(x))  →  Relu(x) or Clip(x)
    x · Clip(x + 3, 0, 6) / 6, in any operand order          →  HardSwish(x)         (Howard et al. 2019)

Their preconditions are onnxscript's. A rule is listed here only if its result is a standard op that is not
slower than what it replaces; the families for norms, attention and rotary embeddings are not taken, because
canonicalize raises those to the ops of opset 23.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.rewriter.rules import common

from ..infrastructure.rewriter import PatternRule, Rule

HARD_SWISH_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})
"""What onnxruntime's kernels take; the arithmetic that spells it out runs in float64 too."""


def borrowed_rules() -> list[Rule]:
    """The rules; those of one family share a name."""
    rules: list[Rule] = [
        PatternRule(common.fuse_pad_into_conv_rule, "pad-into-conv"),
        PatternRule(common.successive_relu_rule, "successive-relu"),
        PatternRule(common.successive_relu_clip_rule, "successive-relu-clip"),
        PatternRule(common.successive_clip_relu_rule, "successive-clip-relu"),
        PatternRule(common.successive_clip_rule, "successive-clip"),
    ]
    rules += [
        PatternRule(rule, "hard-swish", types=HARD_SWISH_TYPES)
        for rule in common.fuse_hardswish_rules().rules
    ]
    return rules
