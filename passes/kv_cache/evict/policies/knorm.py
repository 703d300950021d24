"""Keep keys with small norms: score = −‖k‖₂.

Source: Devoto et al., 2024, "A simple and effective L2 norm-based strategy for KV cache compression"
(https://arxiv.org/abs/2406.11430).
"""

from __future__ import annotations

from .policy import Policy

KNORM = Policy(
    name="knorm",
    body="""
  last = Constant <value_ints: ints = [-1]> ()
  norm = ReduceL2 <keepdims: int = 0> (keys, last)
  score = Neg (norm)
""",
)
