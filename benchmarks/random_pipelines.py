"""Random pipelines: passes in any order that their facts allow, with random options.

Options come from a table with an entry for every pass that is installed; `test_fuzz` checks that none is
missing. Values are of the sizes of the small models that they run on, and work that is timed or trained is
short.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from planish.ir.errors import PipelineError
from planish.passes.infrastructure import registry
from planish.passes.infrastructure.base import Fact, Pass
from planish.passes.infrastructure.facts import facts_after
from planish.passes.infrastructure.pipeline import Pipeline

Options = dict[str, Any]
SCHEMES = (
    "W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16_ASYM", "W8A8", "W8A8_ASYM", "W4A8", "W4A4", "W6A6", "NF4",
    "FP4", "MXFP4A16", "NVFP4A16", "FP8A16",
)  # fmt: skip
CLEAN_UPS = (
    "CommonSubexpressionEliminationPass", "IdentityEliminationPass", "RemoveUnusedNodesPass",
    "TopologicalSortPass", "RemoveUnusedFunctionsPass", "LiftConstantsToInitializersPass",
    "RemoveUnusedOpsetsPass",
)  # fmt: skip
"""Passes of onnx_ir, which a pipeline takes by their class names."""
LONGEST = 7


class Drawing:
    """Draws options.

    Args:
        rng: where from.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def chance(self, probability: float) -> bool:
        """True so often."""
        return bool(self.rng.random() < probability)

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def some(self, probability: float, **choices: tuple[Any, ...]) -> Options:
        """Each option with this probability, and one of its values."""
        return {name: self.pick(*values) for name, values in choices.items() if self.chance(probability)}


def _allocate(draw: Drawing) -> Options:
    budget = draw.pick(
        {"bits_per_weight": draw.pick(4.5, 6.0, 10.0)}, {"bytes": draw.pick(2000, 8000)}, {"loss": 0.1}
    )
    return (
        budget | {"samples": 2} | draw.some(0.3, group_size=(16, 32), together=(False,), clip=(True, False))
    )


def _canonicalize(draw: Drawing) -> Options:
    return draw.some(0.15, untie=(True,), folding_limit=(0, 16, 1024))


def _distill(draw: Drawing) -> Options:
    options = {"steps": draw.pick(1, 2, 3), "batch": 2, "held_out": draw.pick(0.1, 0.4)}
    return options | draw.some(0.3, hidden=(0.5,), squarehead=(0.0,), keep_zeros=(True,), embeddings=(True,))


def _drop_blocks(draw: Drawing) -> Options:
    target = draw.pick({"count": draw.pick(1, 2)}, {"sparsity": draw.pick(0.1, 0.4)})
    options = draw.some(0.3, method=("greedy",), unit=("layer",), neighbours=(3,))
    return target | {"protect": draw.pick([], [0]), "samples": 2} | options


def _evict(draw: Drawing) -> Options:
    policies = ("random", "recent", "knorm", "keydiff", "snapkv", "tova", "h2o", "expected-attention")
    options = {"policy": draw.pick(*policies), "sinks": 1, "recent": draw.pick(1, 2), "draws": 4}
    rare = draw.some(0.25, rescore=("graphkv", "kvcrush", "drawn"), merge=(True,), renumber=(True,))
    budgets = draw.some(0.3, budget=("pyramid", "prefix", "heads", "cokv"), keep=(0.3, 0.7), future=(8,))
    return options | rare | budgets


def _fuse(draw: Drawing) -> Options:
    return draw.some(0.15, merge_linears=(False,), attention_layout=(False,), ignore=(["lm_head"],))


def _group_queries(draw: Drawing) -> Options:
    return {"kv_heads": draw.pick(1, 1, 2), **draw.some(0.4, grouping=("neighbours",))}


def _prune(draw: Drawing) -> Options:
    options = {"sparsity": [draw.pick(0.2, 0.5)], "evaluations": 6, "samples": 4}
    rare = draw.some(
        0.3, multiple=(1, 2, 4), criterion=("magnitude", "wanda", "taylor", "random"), damp=(0.01,)
    )
    structures = draw.some(0.3, structures=(["ffn"], ["attention", "module"], ["convolution"], ["other"]))
    return options | rare | structures


def _quantize(draw: Drawing) -> Options:
    options = {"scheme": draw.pick(*SCHEMES)}
    options |= draw.some(
        0.35, group_size=(16, 32, -1), embeddings=(False,), clip=(True, False), symmetric=(True, False)
    )
    options |= draw.some(
        0.25, activations=("tensor", "token", "static"), ignore=([],), compensate_rank=(1, 4)
    )
    options |= draw.some(
        0.35, algorithm=("gptq", "gptaq", "awq-clip", "spqr"), act_order=(False,), sweeps=(0, 1)
    )
    return options | draw.some(0.1, calibrator=("percentile", "mse", "entropy"), reduce_range=(True, False))


def _rotate(draw: Drawing) -> Options:
    rotations = [name for name in ("R1", "R2", "R3", "R4") if draw.chance(0.5)] or ["R1"]
    options = {"rotations": rotations, "steps": 2, "sequences": 2}
    kinds = draw.some(0.5, kind=("random-hadamard", "random-matrix", "learned"))
    return options | kinds | draw.some(0.15, when=("pays",), across_heads=(True,), max_cost=(100.0,))


def _scale(draw: Drawing) -> Options:
    options = draw.some(0.5, method=("awq",), alpha=(0.3, 0.85))
    return options | draw.some(0.3, scheme=("W8A8", "W3A16"), group_size=(16,), clip=(True,), candidates=(4,))


def _shrink_heads(draw: Drawing) -> Options:
    return draw.some(0.5, keep=(0.25, 0.75))


def _sparsify(draw: Drawing) -> Options:
    options = {"steps": draw.pick(2, 4), "batch": 2, "frequency": 1}
    patterns = draw.pick({"pattern": "2:4"}, {"sparsity": draw.pick(0.3, 0.7)}, {"scope": "layer"})
    return options | patterns | draw.some(0.3, method=("ac-dc",))


def _two_stage(draw: Drawing) -> Options:
    return {"sparsity": draw.pick(0.2, 0.5), "samples": 2} | draw.some(0.3, multiple=(4,), alpha=(1.0,))


def _drawn(name: str, draw: Drawing) -> Pass:
    """A pass whose options go together."""
    while True:
        with contextlib.suppress(PipelineError):
            return registry.build(name, OPTIONS[name](draw))


def _nothing(draw: Drawing) -> Options:
    del draw
    return {}


OPTIONS: Mapping[str, Callable[[Drawing], Options]] = {
    "allocate": _allocate,
    "canonicalize": _canonicalize,
    "center-cache": _nothing,
    "distill": _distill,
    "drop-blocks": _drop_blocks,
    "evict": _evict,
    "fold-norms": lambda draw: draw.some(0.3, center=(False,)),
    "fuse": _fuse,
    "group-queries": _group_queries,
    "kv-cache": lambda draw: draw.some(0.5, bits=(4,), granularity=("per-tensor",)),
    "last-logits": _nothing,
    "prune": _prune,
    "quantize": _quantize,
    "raise-cache": _nothing,
    "rotate": _rotate,
    "scale": _scale,
    "shrink-heads": _shrink_heads,
    "sparsify": _sparsify,
    "two-stage": _two_stage,
    "window": lambda draw: draw.some(0.6, tokens=(2, 3)),
}
"""How the options of each pass are drawn."""
OFTEN = {"canonicalize": 1, "fuse": 6, "quantize": 6, "rotate": 3, "fold-norms": 4, "scale": 3, "prune": 2}
"""How often a pass is drawn relative to the others, which have 1."""
OF_CACHES = frozenset(
    {"center-cache", "evict", "group-queries", "kv-cache", "last-logits", "raise-cache", "window"}
)
"""Passes that do nothing without a key-value cache: drawn often where there is one, and seldom elsewhere."""


def random_pipeline(seed: int, *, has_cache: bool) -> Pipeline:
    """The pipeline of a seed: its facts allow it, except for a few that start without a canonical form.

    Args:
        seed: decides everything.
        has_cache: whether the model is a decoder with a cache: passes about caches are drawn more often then.
    """
    rng = np.random.default_rng((seed, 1))
    draw = Drawing(rng)
    passes = [] if draw.chance(0.02) else [_drawn("canonicalize", draw)]
    facts: frozenset[Fact] = frozenset({Fact.CANONICAL})
    names = sorted(OPTIONS)
    weights = np.array(
        [OFTEN.get(name, 1.0) * (0.05 if name in OF_CACHES and not has_cache else 1) for name in names]
    )
    for _ in range(int(rng.integers(0, LONGEST))):
        if draw.chance(0.08):
            passes.append(registry.build(draw.pick(*CLEAN_UPS), {}))
            continue
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        kind = registry.find(name)
        if kind.requires <= facts and not kind.forbids & facts:
            built = _drawn(name, draw)
            passes.append(built)
            facts = facts_after(built, facts)
    return Pipeline(tuple(passes))
