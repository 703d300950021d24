"""Keep what the end of the text attends to: score = pool(mean over the last queries of their attention).

    score_t = avgpool_t( mean over the group's heads and the last w queries of softmax(q Kᵀ · scale)_t )

The window itself stays. Source: Li et al., 2024, "SnapKV: LLM knows what you are looking for before
generation" (https://arxiv.org/abs/2404.14469).
"""

from __future__ import annotations

from .policy import PROBABILITIES, Policy

SNAPKV = Policy(
    name="snapkv",
    window=32,
    pooled=True,
    attention=True,
    body=PROBABILITIES
    + """
  heads_and_queries = Constant <value_ints: ints = [2, 3]> ()
  attention = ReduceMean <keepdims: int = 0> (probabilities, heads_and_queries)
  score = AveragePool <kernel_shape: ints = @kernel, pads: ints = @pads, count_include_pad: int = 1>
    (attention)
""",
)
