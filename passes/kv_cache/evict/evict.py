"""Let a decoder forget tokens of its cache: after the prompt, and again every so many tokens.

    present ← (k_t, v_t) for t among the k tokens of highest score,  k = ⌈keep · tokens of the text⌉

What a token is worth says the policy (see `policies`), how many each layer keeps the budget (see `budgets`).
Keys are stored rotated and keep their positions; ``position_ids`` go on counting the text.

The decoder gets an input ``cache_lengths`` (see `own_lengths`), and a second model is made beside it, the
eviction itself (see `companion`), which `save` writes as ``evict.onnx`` into the same folder.
``CompiledModel.generate`` runs both. onnxruntime-genai does not: it takes all layers of a cache for equally
long, and as long as the text.

Preconditions: the fused form; masks hide the future and padding only. At run time texts of a batch have one
length. Quantise the cache (`kv-cache`) before, if at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ....ir.companions import EVICTION, EVICTS_KEY, attach
from ....ir.errors import MissingDataError, PassError, PipelineError
from ....ir.graph_builder import GraphBuilder
from ....ir.views.caches import CachedLayer, cached_layers
from ....runtime.generate.eviction import RENUMBERS_KEY, WINDOW_KEY
from ....runtime.sensitivity import first_samples
from ...infrastructure.base import Contract, Coverage, Fact, Pass, PassContext, PassResult
from ..raise_cache import raised_layers
from .budgets import (
    Budget,
    HeadGroups,
    contribution_shares,
    grouped,
    layer_shares,
    mass_shares,
    prefix_shares,
)
from .companion import CompanionBuilder, LayerPlan, QueryStatistics, Selection
from .contributions import Coalitions, contributions
from .own_lengths import check_masks, give_own_lengths
from .policies import ALL, POLICIES, Policy
from .rescoring import Rescoring
from .rotations import is_plain
from .split_heads import split_heads
from .statistics import Mass, Observed, observe

_MASS: Mapping[str, Mass] = {"prefix": "layer", "heads": "heads"}
"""What a budget asks of calibration data."""
_SAMPLES = 8
"""Texts that contributions are measured on."""
_TO_THE_END = np.iinfo(np.int64).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict(Pass):
    """Keep only some tokens in the key-value cache.

    Attributes:
        policy: how tokens are scored: random, recent, knorm, keydiff, snapkv, tova, h2o, expected-attention.
        keep: share of the text's tokens that stay, over all layers.
        tokens: that stay in each layer at least, however short the text.
        sinks: tokens at the beginning that stay in any case.
        recent: tokens at the end that stay in any case.
        budget: how the share is spread over the layers: uniform, pyramid, prefix (by attention
            mass), heads (by mass, over heads, too), or cokv (by what heads contribute together).
        draws: coalitions of heads that cokv compares with all others: two runs of the model each.
        window: of how many last tokens a policy reads the queries; 0 for the policy's own number.
        kernel: neighbours that snapkv averages scores over; odd.
        future: positions at which expected-attention expects the next queries.
        rescore: what is made of the scores before tokens are chosen: none, graphkv, kvcrush, or drawn (in
            proportion to the scores, for policies whose scores are attention).
        merge: average the values of evicted tokens into those of the most similar ones that stay.
        renumber: positions count what is in the cache, and not the text: kept keys are turned back to their
            new places. Texts may then be longer than the model's positions, as in StreamingLLM.
    """

    name: ClassVar[str] = "evict"
    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL, Fact.FUSED})

    policy: str = "snapkv"
    keep: float = 0.5
    tokens: int = 0
    sinks: int = 4
    recent: int = 32
    budget: Budget = "uniform"
    draws: int = 64
    window: int = 0
    kernel: int = 5
    future: int = 512
    rescore: Rescoring = "none"
    merge: bool = False
    renumber: bool = False

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PipelineError(f"evict: expected a policy of {', '.join(POLICIES)}, found {self.policy!r}")
        if not 0 <= self.keep <= 1:
            raise PipelineError(f"evict: keep: expected a share from 0 to 1, found {self.keep}")
        if not self.keep and not self.tokens:
            raise PipelineError("evict: keep and tokens are 0, and nothing would stay")
        if self.renumber and self.budget != "uniform":
            raise PipelineError(
                "evict: what is renumbered must be equally long in all layers: budget=uniform"
            )
        if min(self.tokens, self.sinks, self.recent, self.window) < 0 or self.future < 1:
            raise PipelineError(
                "evict: tokens, sinks, recent and window cannot be negative, future is positive"
            )
        if self.draws < 1:
            raise PipelineError(f"evict: draws: expected at least 1, found {self.draws}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PipelineError(f"evict: kernel: expected an odd number, found {self.kernel}")
        if self.rescore == "drawn" and not POLICIES[self.policy].attention:
            fitting = ", ".join(policy.name for policy in POLICIES.values() if policy.attention)
            raise PipelineError(
                f"evict: tokens are drawn in proportion to attention, and scores of {self.policy} are none",
                hint=f"take one of {fitting}, or leave rescore out",
            )
        if self.window and not POLICIES[self.policy].window:
            raise PipelineError(f"evict: the policy {self.policy} reads no queries: leave window out")

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        """Rewrite ``model`` in place, and attach the model that evicts."""
        layers = raised_layers(model, self.name)
        check_masks(layers)
        policy = POLICIES[self.policy]
        plans = self._plans(model, layers, policy, ctx)
        layers = [plan.layer for plan in plans]
        if self.merge and any(layer.past_value.dtype != ir.DataType.FLOAT for layer in layers):
            raise PassError(
                "evict: values that are stored as integers cannot be merged", hint="leave merge out"
            )
        companion = CompanionBuilder(self._selection(policy, ctx), len(layers))
        for index, plan in enumerate(plans):
            companion.add(index, plan)
        give_own_lengths(model, layers)
        if policy.window:
            _give_queries(model, layers, self.window or policy.window)
        evicting = companion.model()
        evicting.metadata_props[WINDOW_KEY] = str(self.window or policy.window)
        attach(model, EVICTION, evicting)
        if self.renumber:
            evicting.metadata_props[RENUMBERS_KEY] = "true"
        model.metadata_props[EVICTS_KEY] = (
            f"{self.policy}, keeps {self.keep:g}; run by planish with evict.onnx"
        )
        return PassResult(
            modified=True,
            coverage=Coverage(unit="layers of the cache", covered=len(layers)),
            redefined_outputs=frozenset(
                str(value.name) for layer in layers for value in (layer.present_key, layer.present_value)
            ),
        )

    def _selection(self, policy: Policy, ctx: PassContext) -> Selection:
        return Selection(
            policy=policy,
            tokens=self.tokens,
            sinks=self.sinks,
            # The policy's own window is always kept: its tokens are seen by few of its queries.
            recent=max(self.recent, self.window or max(policy.window, 0)),
            kernel=self.kernel,
            future=self.future,
            rescoring=self.rescore,
            merges=self.merge,
            seed=int(ctx.rng.integers(2**16)),
        )

    def _plans(
        self, model: ir.Model, layers: Sequence[CachedLayer], policy: Policy, ctx: PassContext
    ) -> list[LayerPlan]:
        observed = [Observed()] * len(layers)
        wanted = _MASS.get(self.budget, "")
        if policy.expects or wanted:
            stream = ctx.activation_stream(model)
            observed = [
                observe(layer, stream, queries=policy.expects, mass=wanted)
                for layer in ctx.progress(layers, "observe attention")
            ]
        if self.budget in ("heads", "cokv"):
            return self._plans_of_groups(model, layers, observed, ctx)
        if self.budget == "prefix":
            shares = prefix_shares([seen.mass[0] for seen in observed], self.keep)
        else:
            assert self.budget in ("uniform", "pyramid")
            shares = layer_shares(self.budget, self.keep, len(layers))
        return [
            self._plan(layer, share, seen.queries)
            for layer, share, seen in zip(layers, shares, observed, strict=True)
        ]

    def _plans_of_groups(
        self, model: ir.Model, layers: Sequence[CachedLayer], observed: Sequence[Observed], ctx: PassContext
    ) -> list[LayerPlan]:
        """Split the heads of each layer into groups with caches of their own, and plan those."""
        if self.budget == "heads":
            shares = mass_shares([seen.mass for seen in observed], self.keep)
        else:
            shares = contribution_shares(self._contributions(model, ctx), self.keep)
        groups = [grouped(of_layer) for of_layer in shares]
        split_heads(model, layers, [group.heads for group in groups])
        ctx.remark("heads", _describe(groups))
        planned = [
            (share, seen.of_heads(heads, layer.heads))
            for layer, group, seen in zip(layers, groups, observed, strict=True)
            for heads, share in zip(group.heads, group.shares, strict=True)
        ]
        return [
            self._plan(layer, share, statistics)
            for layer, (share, statistics) in zip(cached_layers(model), planned, strict=True)
        ]

    def _contributions(self, model: ir.Model, ctx: PassContext) -> list[npt.NDArray[np.float64]]:
        """Of the heads of each layer."""
        data = ctx.calibration or ctx.examples
        if not data:
            raise MissingDataError(
                "evict: what heads contribute is measured on calibration data, and there is none",
                hint="give compile(..., calibration=inputs), or example_inputs",
            )
        coalitions = Coalitions(model, first_samples(data, _SAMPLES, model))
        draws = list(ctx.progress(range(self.draws), "draw coalitions of heads"))
        found = contributions(coalitions.utility, sum(coalitions.heads), draws, ctx.rng)
        return np.split(found, np.cumsum(coalitions.heads)[:-1])

    def _plan(self, layer: CachedLayer, share: float, statistics: QueryStatistics | None) -> LayerPlan:
        rotary = _rotation_of_keys(layer) if self.renumber else None
        return LayerPlan(layer=layer, share=share, rotary=rotary, statistics=statistics)


def _describe(groups: Sequence[HeadGroups]) -> str:
    shares = [share for of_layer in groups for share in of_layer.shares]
    return f"{len(shares)} groups of heads keep {min(shares):.1%} to {max(shares):.1%} of the tokens"


def _rotation_of_keys(layer: CachedLayer) -> ir.Node:
    """What turns the keys that are stored in a layer.

    Raises:
        PassError: nothing does, or rotations do not add up.
    """
    key = layer.attention.inputs[1]
    node = None if key is None else key.producer()
    if node is None or node.op_type != "RotaryEmbedding" or not is_plain(node):
        found = "its keys are not turned by a plain RotaryEmbedding"
    elif layer.past_key.dtype != ir.DataType.FLOAT:
        found = f"its keys are stored as {layer.past_key.dtype}"
    else:
        return node
    raise PassError(
        f"evict: past_key_values.{layer.index} cannot be renumbered: {found}", hint="leave renumber out"
    )


def _give_queries(model: ir.Model, layers: Sequence[CachedLayer], window: int) -> None:
    """Outputs ``query.{i}``, [batch, count, heads · size]: rotated queries of the last tokens, or of all."""
    build = GraphBuilder("planish.queries")
    start, end, axis = (
        build.constant(np.array([number], np.int64), name)
        for number, name in ((-window, "start"), (_TO_THE_END, "end"), (1, "axis"))
    )
    for layer in layers:
        query = layer.attention.inputs[0]
        if query is None:
            raise PassError(f"evict: layer {layer.index} has no queries")
        last = build.op("Identity", query) if window == ALL else build.op("Slice", query, start, end, axis)
        width = None if query.shape is None else query.shape[2]
        last.name, last.type = f"query.{layer.index}", query.type
        last.shape = ir.Shape(["batch_size", "queries", width])
        model.graph.outputs.append(last)
    if window != ALL:
        for value in build.initializers:
            model.graph.register_initializer(value)
    model.graph.extend(build.nodes)
