"""Keep what coming queries are expected to attend to, times the size of its value.

    q ~ N(μ̄, Σ̄),  μ̄ = R̄ μ,  Σ̄ = R̄ Σ R̄ᵀ,  R̄ = mean of the rotations of the next 512 positions
    s_t = mean over the group of softmax_t( μ̄ᵀk_t · scale + ½ · k_tᵀ Σ̄ k_t · scale² )
    score_t = s_t · ‖v_t‖₂

μ and Σ are those of queries before their rotation, from calibration data, without the first tokens of each
text. The exponent is the logarithm of E[exp(q·k · scale)] for a normal q. Source: Devoto et al., 2025,
"Expected attention: KV cache compression by estimating attention from future queries distribution"
(https://arxiv.org/abs/2510.00636).
"""

from __future__ import annotations

from .policy import Policy

EXPECTED_ATTENTION = Policy(
    name="expected-attention",
    expects=True,
    attention=True,
    body="""
  last = Constant <value_ints: ints = [-1]> ()
  group_axis = Constant <value_ints: ints = [2]> ()
  grouped_shape = Constant <value_ints: ints = @grouped_shape> ()
  factor = Constant <value_float: float = @scale> ()
  half = Constant <value_float: float = 0.5> ()
  grouped_mean = Reshape (mean, grouped_shape)
  grouped_covariance = Reshape (covariance, grouped_shape)
  keys_group = Unsqueeze (keys, group_axis)
  along_mean = Mul (keys_group, grouped_mean)
  first_order = ReduceSum <keepdims: int = 0> (along_mean, last)
  turned = MatMul (keys_group, grouped_covariance)
  squares = Mul (turned, keys_group)
  variance = ReduceSum <keepdims: int = 0> (squares, last)
  first_scaled = Mul (first_order, factor)
  variance_scaled = Mul (variance, factor)
  variance_scaled_again = Mul (variance_scaled, factor)
  second_order = Mul (variance_scaled_again, half)
  exponent = Add (first_scaled, second_order)
  expected = Softmax <axis: int = -1> (exponent)
  attention = ReduceMean <keepdims: int = 0> (expected, group_axis)
  value_norm = ReduceL2 <keepdims: int = 0> (values, last)
  score = Mul (attention, value_norm)
""",
)
