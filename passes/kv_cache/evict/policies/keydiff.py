"""Keep keys unlike the others: score = −cos(k, mean over tokens of k / ‖k‖).

Source: Park et al., 2025, "KeyDiff: key similarity-based KV cache eviction"
(https://arxiv.org/abs/2504.15364).
"""

from __future__ import annotations

from .policy import Policy

KEYDIFF = Policy(
    name="keydiff",
    body="""
  last = Constant <value_ints: ints = [-1]> ()
  tokens = Constant <value_ints: ints = [2]> ()
  smallest = Constant <value_float: float = 1.0e-12> ()
  norm = ReduceL2 <keepdims: int = 1> (keys, last)
  safe_norm = Max (norm, smallest)
  unit = Div (keys, safe_norm)
  anchor = ReduceMean <keepdims: int = 1> (unit, tokens)
  anchor_norm = ReduceL2 <keepdims: int = 1> (anchor, last)
  safe_anchor_norm = Max (anchor_norm, smallest)
  unit_anchor = Div (anchor, safe_anchor_norm)
  products = Mul (unit, unit_anchor)
  cosine = ReduceSum <keepdims: int = 0> (products, last)
  score = Neg (cosine)
""",
)
