"""Random eviction: score ~ U(0, 1). The baseline that every policy must beat.

    score_i = frac(43758.5453 · sin(12.9898 · i + 78.233 · seed)),   i counting all tokens of all heads

in float64, a hash that graphics programs use: onnxruntime has no random numbers at this opset, and with it an
eviction can be repeated.
"""

from __future__ import annotations

from .policy import Policy

UNIFORM = """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  seed = Constant <value_float: float = @seed> ()
  step_float = Constant <value_float: float = 12.9898> ()
  spread_float = Constant <value_float: float = 43758.5453> ()
  seed_step = Constant <value_float: float = 78.233> ()
  shape = Shape <start: int = 0, end: int = 3> (keys)
  count = ReduceProd <keepdims: int = 0> (shape)
  numbers = Range (zero, count, one)
  positions = Cast <to: int = 11> (numbers)
  step = Cast <to: int = 11> (step_float)
  spread = Cast <to: int = 11> (spread_float)
  start_float = Mul (seed, seed_step)
  start = Cast <to: int = 11> (start_float)
  along = Mul (positions, step)
  angles = Add (along, start)
  waves = Sin (angles)
  wide = Mul (waves, spread)
  whole = Floor (wide)
  fraction = Sub (wide, whole)
  numbers_of_tokens = Cast <to: int = 1> (fraction)
  uniform = Reshape (numbers_of_tokens, shape)
"""
"""``uniform`` [batch, kv_heads, length] from ``keys`` and the attribute ``seed``."""

RANDOM = Policy(name="random", seeded=True, body=UNIFORM + "  score = Identity (uniform)\n")
