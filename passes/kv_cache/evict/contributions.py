"""What heads of a cache contribute together: a cooperative game whose players are heads of keys and values.

    U(S) = −KL(full ‖ only the heads in S see all tokens)      the others see the first 4 and the last 32
    C(S) = U(S) − U(N ∖ S)                                     the complementary contribution of a coalition
    c_h  = mean over sizes m of the mean of C(S) over drawn S with |S| = m that h is in

N are all heads of all layers. A draw of S is one of N ∖ S, too, with the opposite sign. Sizes are a quarter,
half and three quarters of all heads. With all sizes and all S, c_h is the Shapley value of h.

Source: Sun et al., 2025, "CoKV: optimizing KV cache allocation via cooperative game"
(https://arxiv.org/abs/2502.17501), where U is the metric of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....ir import clone
from ....ir.graph_builder import GraphBuilder
from ....ir.views.caches import CachedLayer, cached_layers
from ....ir.views.values import integer
from ....runtime.sensitivity import WeightSensitivity
from ...infrastructure.base import Feeds

Contributions = npt.NDArray[np.float64]
Members = npt.NDArray[np.bool_]

_SINKS, _RECENT = 4, 32
_SIZES = (0.25, 0.5, 0.75)
_MASK_INPUT = 3


class Coalitions:
    """The model with a switch for each head: whether it sees all tokens, or only the ends of the text.

    Args:
        model: raised; not changed.
        samples: complete feeds, one small batch each.
    """

    def __init__(self, model: ir.Model, samples: Sequence[Feeds]) -> None:
        switched = clone(model)
        layers = cached_layers(switched)
        self._heads = [layer.heads for layer in layers]
        self._names = [_add_switch(switched, layer) for layer in layers]
        self._sensitivity = WeightSensitivity(switched, self._names, samples)

    @property
    def heads(self) -> list[int]:
        """Of keys and values, by layer."""
        return self._heads

    def utility(self, members: Members) -> float:
        """U of a coalition, [all heads]."""
        switches = np.split(members, np.cumsum(self._heads)[:-1])
        return -self._sensitivity.loss(dict(zip(self._names, switches, strict=True)))


def contributions(
    utility: Callable[[Members], float], heads: int, draws: Sequence[int], rng: np.random.Generator
) -> Contributions:
    """c of each head, [heads].

    Args:
        utility: U of a coalition.
        heads: players.
        draws: one number for each draw: their sizes take turns.
        rng: draws coalitions.
    """
    sizes = sorted({min(max(round(share * heads), 1), heads - 1) for share in _SIZES})
    sums, counts = np.zeros((heads + 1, heads)), np.zeros((heads + 1, heads))
    for draw in draws:
        size = sizes[draw % len(sizes)]
        members = np.zeros(heads, bool)
        members[rng.permutation(heads)[:size]] = True
        gain = utility(members) - utility(~members)
        for coalition, sign in ((members, 1.0), (~members, -1.0)):
            place = int(coalition.sum())
            sums[place] += sign * gain * coalition
            counts[place] += coalition
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    seen = counts.any(axis=0)
    found = np.zeros(heads)
    found[seen] = np.nanmean(means[:, seen], axis=0)
    return found


def _add_switch(model: ir.Model, layer: CachedLayer) -> str:
    """Let a constant [heads] say which heads see all tokens; its name."""
    node = layer.attention
    mask = node.inputs[_MASK_INPUT]
    assert mask is not None
    build = GraphBuilder(f"planish.switch.{layer.index}")
    shared = (integer(node, "q_num_heads") or layer.heads) // layer.heads
    switch = build.constant(np.ones(layer.heads, bool), "heads")
    of_query = build.constant(np.repeat(np.arange(layer.heads), shared), "of_query")
    axes = build.constant(np.array([0, 2, 3]), "axes")
    whole = build.op("Unsqueeze", build.op("Gather", switch, of_query, axis=0), axes)
    allowed = build.op("And", mask, build.op("Or", whole, _ends(build, mask)))
    for value in build.initializers:
        model.graph.register_initializer(value)
    model.graph.insert_before(node, build.nodes)
    node.replace_input_with(_MASK_INPUT, allowed)
    return str(switch.name)


def _ends(build: GraphBuilder, mask: ir.Value) -> ir.Value:
    """[sequence, total]: the first tokens of the text and the last ones before each query."""
    zero, one = (build.constant(np.array(number, np.int64), f"{number}") for number in (0, 1))
    column = build.constant(np.array([1]), "column")
    new = build.op("Squeeze", build.op("Shape", mask, start=-2, end=-1))
    total = build.op("Squeeze", build.op("Shape", mask, start=-1))
    keys = build.op("Range", zero, total, one)
    queries = build.op("Unsqueeze", build.op("Range", build.op("Sub", total, new), total, one), column)
    recent = build.constant(np.array(_RECENT, np.int64), "recent")
    is_recent = build.op("Greater", keys, build.op("Sub", queries, recent))
    return build.op(
        "Or", is_recent, build.op("Less", keys, build.constant(np.array(_SINKS, np.int64), "sinks"))
    )
