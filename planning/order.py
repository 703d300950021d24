"""Which orders of passes make sense among those that are legal, and why."""

from __future__ import annotations

from ..ir.errors import PipelineError
from ..passes.infrastructure.base import Fact, Pass
from ..passes.infrastructure.pipeline import Pipeline

_PRUNING = ("drop-blocks", "two-stage", "prune", "sparsify")
_WEIGHTS = ("rotate", "scale", "allocate", "quantize")

RULES: tuple[tuple[str, str, str], ...] = (
    *((pruning, "distill", "distillation makes up for what was pruned before it") for pruning in _PRUNING),
    *(
        (pruning, later, f"{later} chooses its numbers for the weights that stay")
        for pruning in _PRUNING
        for later in _WEIGHTS
    ),
    *(("distill", later, f"training moves the weights that {later} chose numbers for") for later in _WEIGHTS),
    ("drop-blocks", "prune", "channels of blocks that go need not be ranked"),
    ("fold-norms", "rotate", "a rotation passes through norms that have no weights"),
    ("rotate", "scale", "scales are found for the activations as they will be quantised"),
    ("rotate", "allocate", "bits are chosen by the errors of the weights as they will be quantised"),
    ("scale", "allocate", "bits are chosen by the errors of the weights as they will be quantised"),
    ("allocate", "quantize", "quantize follows the bits that allocate chose"),
    ("group-queries", "quantize", "heads are averaged in float"),
    ("center-cache", "kv-cache", "keys without their mean need fewer levels"),
    ("last-logits", "quantize", "what is cut off need not be quantised"),
)
"""(the earlier pass, the later pass, why). All are about results: facts say what is legal."""


def advice(pipeline: Pipeline, facts: frozenset[Fact] = frozenset()) -> tuple[Pipeline, list[str]] | None:
    """The same passes in an order that makes more sense, and why; None if there is nothing to say.

    Args:
        pipeline: in a legal order.
        facts: what holds of the model before it.
    """
    passes, reasons = list(pipeline), []
    # Rules have no cycle, so every move settles a pair for good; the limit is for whoever adds one.
    for _ in range(len(passes) ** 2):
        found = _first_broken(passes)
        if found is None:
            break
        early, late, reason = found
        reasons.append(f"{passes[late].name} belongs before {passes[early].name}: {reason}")
        passes.insert(early, passes.pop(late))
    better = Pipeline(tuple(passes))
    try:
        better.check_legal(facts)
    except PipelineError:
        return None
    return (better, reasons) if reasons else None


def _first_broken(passes: list[Pass]) -> tuple[int, int, str] | None:
    """The places of two passes that are the wrong way round, and why."""
    names = [pass_.name for pass_ in passes]
    for early, name in enumerate(names):
        for late in range(early + 1, len(names)):
            for first, second, reason in RULES:
                if (first, second) == (names[late], name) and name != names[late]:
                    return early, late, reason
    return None
