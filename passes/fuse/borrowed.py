"""Rewrites that onnxscript's rule library has already, run by planish's driver.

    Conv(Pad(x)) with zeros in the spatial axes              →  Conv(x) with wider pads
    Relu(Relu(x)), Relu(Clip(x)), …, Clip(Clip(x))           →  Relu(x) or Clip(x)

Their preconditions are onnxscript's. A rule is listed here only if its result is a standard op that is not
slower than what it replaces; the families for norms, attention and rotary embeddings are not taken, because
canonicalize raises those to the ops of opset 23.
"""

from __future__ import annotations

from onnxscript.rewriter.rules import common

from ..infrastructure.rewriter import PatternRule, Rule


def borrowed_rules() -> list[Rule]:
    """The rules, each under the name that statistics show."""
    return [
        PatternRule(common.fuse_pad_into_conv_rule, "pad-into-conv"),
        PatternRule(common.successive_relu_rule, "successive-relu"),
        PatternRule(common.successive_relu_clip_rule, "successive-relu-clip"),
        PatternRule(common.successive_clip_relu_rule, "successive-clip-relu"),
        PatternRule(common.successive_clip_rule, "successive-clip"),
    ]
