"""What is evicted lives on in what stays: values of alike tokens are averaged.

    place(t) = argmax over kept j of cos(k_t, k_j)
    v_j ← mean of v_t over the tokens t with place(t) = j and cos(k_t, k_j) ≥ 0.5, the kept one among them

Keys stay as they are: rotated keys of different positions have no mean that stands for them. An idea of Li et
al., 2024, "EMS: adaptive evict-then-merge strategy for head-wise KV cache compression"
(https://arxiv.org/abs/2412.08521), which merges keys, too, and by another similarity.

The function holds a similarity of every token to every one that stays: length · kept floats for each head.
"""

from __future__ import annotations

from ....ir.ops.definition import OpDefinition

MERGE = OpDefinition(
    "MergedValues",
    "",
    "(keys, values, index) => (merged)",
    """
  last = Constant <value_ints: ints = [-1]> ()
  tokens_axis = Constant <value_ints: ints = [2]> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  smallest = Constant <value_float: float = 1.0e-12> ()
  threshold = Constant <value_float: float = 0.5> ()
  norm = ReduceL2 <keepdims: int = 1> (keys, last)
  safe_norm = Max (norm, smallest)
  unit = Div (keys, safe_norm)
  kept_unit = GatherND <batch_dims: int = 2> (unit, index)
  turned = Transpose <perm: ints = [0, 1, 3, 2]> (kept_unit)
  cosine = MatMul (unit, turned)
  place = ArgMax <axis: int = -1, keepdims: int = 1> (cosine)
  nearest = ReduceMax <keepdims: int = 1> (cosine, last)
  is_alike = GreaterOrEqual (nearest, threshold)
  kept_list = Shape <start: int = 2, end: int = 3> (index)
  kept = Squeeze (kept_list)
  places = Range (zero, kept, one)
  is_there = Equal (place, places)
  is_merged = And (is_there, is_alike)
  shares = Cast <to: int = 1> (is_merged)
  shares_turned = Transpose <perm: ints = [0, 1, 3, 2]> (shares)
  sums = MatMul (shares_turned, values)
  counts = ReduceSum <keepdims: int = 0> (shares, tokens_axis)
  counts_column = Unsqueeze (counts, last)
  merged = Div (sums, counts_column)
""",
)
"""Values [batch, kv_heads, kept, size] of the tokens at ``index``, and of what is most like them."""
