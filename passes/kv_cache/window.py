"""Let layers that see only the last tokens cache only those.

    maskᵢ has key > query − W   →   a cache of W tokens and some, however long the text

With ``tokens``, layers that see more get such a mask first, as in Longformer and Mistral, which changes what
the model computes; without it, nothing changes. A window without sinks loses the first tokens, on which much
attention rests: `evict` with ``policy=recent,renumber=true`` keeps them (StreamingLLM).

The runtime gives such a layer one buffer, of the window's length or longer, in which the kernel moves tokens
itself. onnxruntime-genai does the same. What was forgotten cannot be gone back to.

Preconditions: the fused form; masks hide the future and padding, and a window. Source of windows: Jiang et
al., 2023, "Mistral 7B" (https://arxiv.org/abs/2310.06825).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ...ir.errors import PipelineError
from ...ir.graph_builder import GraphBuilder
from ...ir.views.caches import CachedLayer
from ...ir.views.masks import CausalMask, causal_mask
from ..infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult, Skipped
from .raise_cache import raised_layers

_MASK_INPUT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Pass):
    """Cache only as many of the last tokens as a layer sees.

    Attributes:
        tokens: that every layer is to see at most; 0 leaves all layers the windows that they have.
    """

    name: ClassVar[str] = "window"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL, Fact.FUSED})

    tokens: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise PipelineError(f"window: tokens cannot be negative, found {self.tokens}")

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place."""
        del ctx
        narrowed: dict[ir.Value, ir.Value] = {}
        skipped = []
        layers = raised_layers(model, self.name)
        for layer in layers:
            reason = self._limit(model, layer, narrowed)
            if reason is not None:
                skipped.append(Skipped(f"past_key_values.{layer.index}", reason))
        coverage = Coverage(
            unit="layers of the cache", covered=len(layers) - len(skipped), skipped=tuple(skipped)
        )
        return PassResult(modified=coverage.covered > 0, coverage=coverage)

    def _limit(self, model: ir.Model, layer: CachedLayer, narrowed: dict[ir.Value, ir.Value]) -> str | None:
        """Give one layer its window; the reason if it has none."""
        node = layer.attention
        mask = node.inputs[_MASK_INPUT]
        seen = causal_mask(mask)
        if mask is None or seen is None:
            return "its mask is not known to hide the future"
        width = seen.window
        if self.tokens and (width is None or width > self.tokens):
            if mask not in narrowed:
                narrowed[mask] = _narrowed(model, mask, seen, self.tokens, node)
            node.replace_input_with(_MASK_INPUT, narrowed[mask])
            width = self.tokens
        if width is None:
            return "it sees all tokens (give tokens=, for a window that it does not have)"
        node.attributes["window"] = ir.AttrInt64("window", width)
        return None


def _narrowed(model: ir.Model, mask: ir.Value, seen: CausalMask, width: int, before: ir.Node) -> ir.Value:
    """mask ∧ key position > query position − width."""
    build = GraphBuilder(f"planish.window.{mask.name}")
    back = build.constant(np.array(width, np.int64), "width")
    bound = build.op("Sub", seen.queries, back)
    bound.type, bound.shape = ir.TensorType(ir.DataType.INT64), seen.queries.shape
    found = build.op("And", mask, build.op("Greater", seen.keys, bound))
    found.type, found.shape = mask.type, mask.shape
    for value in build.initializers:
        model.graph.register_initializer(value)
    model.graph.insert_before(before, build.nodes)
    return found
