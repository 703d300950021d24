"""Keep what the last token attends to, the same tokens in all heads of a layer: score = mean over heads.

Source: Oren et al., 2024, "Transformers are multi-state RNNs" (https://arxiv.org/abs/2401.06104).
"""

from __future__ import annotations

from .policy import PROBABILITIES, Policy

TOVA = Policy(
    name="tova",
    window=1,
    attention=True,
    body=PROBABILITIES
    + """
  all_heads = Constant <value_ints: ints = [1, 2, 3]> ()
  attention = ReduceMean <keepdims: int = 0> (probabilities, all_heads)
  for_each_head = Unsqueeze (attention, column_axis)
  shape = Shape <start: int = 0, end: int = 3> (keys)
  score = Expand (for_each_head, shape)
""",
)
