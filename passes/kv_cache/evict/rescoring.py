"""What is made of scores before the tokens are chosen.

``planish::Rescore`` gives ``rescored`` [batch, kv_heads, length] from ``score``, ``keys`` [batch, kv_heads,
length, size] and ``kept`` [1] int64, the number of tokens that will stay.

GraphKV (2025, https://arxiv.org/abs/2509.00388) lets tokens that are much alike count less, so that
what stays is spread:

    sources = the 0.3 · kept tokens of highest score;   e_ij = max(cos(k_i, k_j), 0)
    s_j ← s_j · Π (1 − e_ij) over the sources i that have j among their m = 8 nearest tokens

Scores are moved up first, so that the lowest of a head is 0: a product makes a negative score larger.

KVCrush (Jha et al., 2025, https://arxiv.org/abs/2503.00022) keeps representatives of what is evicted, a
quarter of what stays:

    b_t ∈ {0, 1}^heads: the token is in the better half of the head;   d_t = Hamming(b_t, majority of all)
    of the tokens that a head would evict, sorted by d_t, evenly spaced ones stay

``drawn`` draws tokens without replacement, each in proportion to its score, by Gumbel's trick (Kool et al.,
2019, "Stochastic beams and where to find them", https://arxiv.org/abs/1903.06059):

    s_j ← log s_j − log(−log u_j),   u_j ~ U(0, 1)

The tokens of highest score are not a fair sample: where attention is spread over many tokens, a softmax over
those alone leaves out what the many others would have added, even if scores were the true future attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ....ir.ops.definition import OpDefinition
from .policies.random import UNIFORM

Rescoring = Literal["none", "graphkv", "kvcrush", "drawn"]

_GRAPHKV = """
  last = Constant <value_ints: ints = [-1]> ()
  sources_axis = Constant <value_ints: ints = [2]> ()
  share = Constant <value_float: float = 0.3> ()
  neighbours = Constant <value_ints: ints = [8]> ()
  one = Constant <value_float: float = 1.0> ()
  nothing = Constant <value_float: float = 0.0> ()
  smallest = Constant <value_float: float = 1.0e-12> ()
  lowest = ReduceMin <keepdims: int = 1> (score, last)
  raised = Sub (score, lowest)
  kept_number = Cast <to: int = 1> (kept)
  wanted = Mul (kept_number, share)
  wanted_up = Ceil (wanted)
  sources_count = Cast <to: int = 7> (wanted_up)
  best, sources = TopK <axis: int = -1> (raised, sources_count)
  norm = ReduceL2 <keepdims: int = 1> (keys, last)
  safe_norm = Max (norm, smallest)
  unit = Div (keys, safe_norm)
  source_column = Unsqueeze (sources, last)
  source_unit = GatherND <batch_dims: int = 2> (unit, source_column)
  turned = Transpose <perm: ints = [0, 1, 3, 2]> (unit)
  cosine = MatMul (source_unit, turned)
  length = Shape <start: int = 2, end: int = 3> (keys)
  zero_long = Constant <value_int: int = 0> ()
  one_long = Constant <value_int: int = 1> ()
  length_number = Squeeze (length)
  positions = Range (zero_long, length_number, one_long)
  itself = Equal (source_column, positions)
  minus_one = Neg (one)
  others = Where (itself, minus_one, cosine)
  nearest_count = Min (neighbours, length)
  nearest, nearest_index = TopK <axis: int = -1> (others, nearest_count)
  threshold = ReduceMin <keepdims: int = 1> (nearest, last)
  is_near = GreaterOrEqual (others, threshold)
  edges = Max (others, nothing)
  decay = Sub (one, edges)
  decay_of_near = Where (is_near, decay, one)
  factor = ReduceProd <keepdims: int = 0> (decay_of_near, sources_axis)
  rescored = Mul (raised, factor)
"""
_KVCRUSH = """
  last = Constant <value_ints: ints = [-1]> ()
  heads_axis = Constant <value_ints: ints = [1]> ()
  tokens_axis = Constant <value_ints: ints = [2]> ()
  half = Constant <value_float: float = 0.5> ()
  quarter = Constant <value_float: float = 0.25> ()
  highest = Constant <value_float: float = 3.0e38> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  two = Constant <value_ints: ints = [2]> ()
  length = Shape <start: int = 2, end: int = 3> (score)
  length_number = Squeeze (length)
  better_count = Div (length, two)
  one_list = Unsqueeze (one, zero)
  better_least = Max (better_count, one_list)
  better, better_index = TopK <axis: int = -1> (score, better_least)
  middle = ReduceMin <keepdims: int = 1> (better, last)
  is_better = GreaterOrEqual (score, middle)
  bits = Cast <to: int = 1> (is_better)
  share_of_tokens = ReduceMean <keepdims: int = 1> (bits, tokens_axis)
  is_majority = GreaterOrEqual (share_of_tokens, half)
  majority = Cast <to: int = 1> (is_majority)
  bit_distance = Sub (bits, majority)
  differs = Abs (bit_distance)
  distance = ReduceSum <keepdims: int = 1> (differs, heads_axis)
  kept_number = Cast <to: int = 1> (kept)
  wanted = Mul (kept_number, quarter)
  wanted_down = Floor (wanted)
  representatives = Cast <to: int = 7> (wanted_down)
  by_score = Sub (kept, representatives)
  evicted = Sub (length, by_score)
  best, best_index = TopK <axis: int = -1> (score, by_score)
  worst_of_best = ReduceMin <keepdims: int = 1> (best, last)
  stays = GreaterOrEqual (score, worst_of_best)
  distance_of_evicted = Where (stays, highest, distance)
  sorted, order = TopK <axis: int = -1, largest: int = 0, sorted: int = 1> (distance_of_evicted, evicted)
  count = Squeeze (representatives)
  steps = Range (zero, count, one)
  far = Mul (steps, evicted)
  spread = Div (far, representatives)
  chosen = Gather <axis: int = 2> (order, spread)
  chosen_shape = Shape (chosen)
  updates = Expand (highest, chosen_shape)
  rescored = ScatterElements <axis: int = 2> (score, chosen, updates)
"""
_DRAWN = (
    UNIFORM
    + """
  least = Constant <value_float: float = 1.0e-7> ()
  most = Constant <value_float: float = 0.9999999> ()
  smallest = Constant <value_float: float = 1.0e-30> ()
  inside = Clip (uniform, least, most)
  log_uniform = Log (inside)
  exponential = Neg (log_uniform)
  log_exponential = Log (exponential)
  positive = Max (score, smallest)
  log_score = Log (positive)
  rescored = Sub (log_score, log_exponential)
"""
)
RESCORE: Mapping[Rescoring, OpDefinition] = {
    "graphkv": OpDefinition("Rescore", "graphkv", "(score, keys, kept) => (rescored)", _GRAPHKV),
    "kvcrush": OpDefinition("Rescore", "kvcrush", "(score, keys, kept) => (rescored)", _KVCRUSH),
    "drawn": OpDefinition("Rescore", "drawn", "<seed> (score, keys, kept) => (rescored)", _DRAWN),
}
"""By the option's name; none is not among them."""
