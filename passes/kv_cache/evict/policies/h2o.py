"""Keep heavy hitters: score = attention that a token got from all queries, averaged over the group.

A token is seen by fewer queries the later it comes; H2O therefore keeps recent tokens besides. Source: Zhang
et al., 2023, "H2O: heavy-hitter oracle for efficient generative inference"
(https://arxiv.org/abs/2306.14048). The text must be run in one chunk before the eviction; queries from before
an earlier eviction do not count.
"""

from __future__ import annotations

from .policy import ALL, PROBABILITIES, Policy

H2O = Policy(
    name="h2o",
    window=ALL,
    attention=True,
    body=PROBABILITIES
    + """
  queries_axis = Constant <value_ints: ints = [3]> ()
  sums = ReduceSum <keepdims: int = 0> (probabilities, queries_axis)
  score = ReduceMean <keepdims: int = 0> (sums, group_axis)
""",
)
