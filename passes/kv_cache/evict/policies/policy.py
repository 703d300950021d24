"""What a policy is: how the tokens of a cache are scored, as the body of an ONNX function.

The function ``planish::EvictionScore``, with the policy's name as overload, gives ``score`` [batch, kv_heads,
length] float32 from

- ``keys``, ``values`` [batch, kv_heads, length, size] float32, keys rotated;
- ``queries`` [batch, heads, count, size] float32, those of the last tokens, rotated, where it asks for them;
- ``mean`` [1, heads, 1, size] and ``covariance`` [1, heads, size, size] of queries, where it asks for those.

Tokens with the highest scores stay.
"""

from __future__ import annotations

import dataclasses

from .....ir.ops.definition import OpDefinition

OP_TYPE = "EvictionScore"
ALL = -1
"""As `Policy.window`: queries of all tokens that were run since the last eviction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """One way to score.

    Attributes:
        name: as the option of `evict` says it.
        body: the function's nodes, see the module's docstring.
        window: of how many last tokens it needs the queries; 0 for none, or `ALL`.
        pooled: the body reads the attribute ``kernel``, over how many neighbours scores are averaged.
        expects: it reads mean and covariance of coming queries.
        seeded: the body reads the attribute ``seed``.
        attention: scores are shares of attention, times something positive at most.
    """

    name: str
    body: str
    window: int = 0
    pooled: bool = False
    expects: bool = False
    seeded: bool = False
    attention: bool = False

    @property
    def definition(self) -> OpDefinition:
        """The function, for a model to hold."""
        inputs = ["keys", "values"]
        attributes = []
        if self.window:
            inputs.append("queries")
        if self.expects:
            inputs += ["mean", "covariance"]
        if self.window or self.expects:
            attributes += ["scale", "grouped_shape"]
        if self.pooled:
            attributes += ["kernel", "pads"]
        if self.seeded:
            attributes.append("seed")
        names = f"<{', '.join(attributes)}> " if attributes else ""
        return OpDefinition(OP_TYPE, self.name, f"{names}({', '.join(inputs)}) => (score)", self.body)


PROBABILITIES = """
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  group_axis = Constant <value_ints: ints = [2]> ()
  column_axis = Constant <value_ints: ints = [1]> ()
  grouped_shape = Constant <value_ints: ints = @grouped_shape> ()
  factor = Constant <value_float: float = @scale> ()
  hidden = Constant <value_float: float = -3.0e38> ()
  grouped = Reshape (queries, grouped_shape)
  turned = Transpose <perm: ints = [0, 1, 3, 2]> (keys)
  turned_group = Unsqueeze (turned, group_axis)
  products = MatMul (grouped, turned_group)
  scaled = Mul (products, factor)
  length_list = Shape <start: int = 2, end: int = 3> (keys)
  count_list = Shape <start: int = 3, end: int = 4> (grouped)
  length = Squeeze (length_list)
  count = Squeeze (count_list)
  key_positions = Range (zero, length, one)
  steps = Range (zero, count, one)
  before = Sub (length, count)
  query_positions = Add (steps, before)
  query_column = Unsqueeze (query_positions, column_axis)
  seen = LessOrEqual (key_positions, query_column)
  masked = Where (seen, scaled, hidden)
  probabilities = Softmax <axis: int = -1> (masked)
"""
"""What the last queries attend to: ``probabilities`` [batch, kv_heads, group, count, length]."""
