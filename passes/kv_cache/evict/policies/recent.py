"""Keep what is recent: score = position in the cache.

With sinks (tokens at the beginning that always stay) these are the tokens that StreamingLLM keeps (Xiao et
al., 2023, https://arxiv.org/abs/2309.17453); here they keep their positions.
"""

from __future__ import annotations

from .policy import Policy

RECENT = Policy(
    name="recent",
    body="""
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  length_list = Shape <start: int = 2, end: int = 3> (keys)
  length = Squeeze (length_list)
  positions = Range (zero, length, one)
  numbers = Cast <to: int = 1> (positions)
  shape = Shape <start: int = 0, end: int = 3> (keys)
  score = Expand (numbers, shape)
""",
)
