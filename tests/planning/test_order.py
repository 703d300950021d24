"""Orders that are legal and make no sense, and those that say nothing."""

import dataclasses
from typing import ClassVar

import pytest
from planish.passes.infrastructure import registry
from planish.passes.infrastructure.base import Fact, Pass, PassResult
from planish.passes.infrastructure.pipeline import Pipeline
from planish.planning.order import RULES, advice


@pytest.mark.parametrize(
    ("given", "better"),
    [
        (
            "canonicalize,distill{steps=9},prune{speedup=2.0}",
            "canonicalize,prune{speedup=2.0},distill{steps=9}",
        ),
        ("canonicalize,rotate,fold-norms", "canonicalize,fold-norms,rotate"),
        ("canonicalize,scale,rotate,quantize", "canonicalize,rotate,scale,quantize"),
        (
            "canonicalize,scale,distill{steps=9},drop-blocks{count=1}",
            "canonicalize,drop-blocks{count=1},distill{steps=9},scale",
        ),
    ],
)
def test_a_better_order(given, better):
    found = advice(Pipeline.of(given))
    assert found is not None
    pipeline, reasons = found
    assert pipeline == Pipeline.of(better)
    assert all("belongs before" in reason for reason in reasons)
    assert advice(pipeline) is None  # nothing is left to say


@pytest.mark.parametrize(
    "given", ["canonicalize", "canonicalize,prune{speedup=2.0},distill{steps=9},fuse,quantize", ""]
)
def test_a_good_order(given):
    assert advice(Pipeline.of(given)) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastLogitsOfFused(Pass):
    name: ClassVar[str] = "last-logits"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUSED})

    def run(self, model, ctx):
        return PassResult(modified=False)


def test_an_order_that_would_not_be_legal_is_not_advised():
    before_fusing = ["canonicalize", "quantize", "fuse", LastLogitsOfFused()]
    after_fusing = ["canonicalize", "fuse", "quantize", LastLogitsOfFused()]
    assert advice(Pipeline.of(before_fusing)) is None
    assert advice(Pipeline.of(after_fusing)) is not None


def test_the_rules_name_passes_and_have_no_cycle():
    names = set(registry.available())
    assert {name for first, second, _ in RULES for name in (first, second)} <= names
    assert not {(first, second) for first, second, _ in RULES} & {
        (second, first) for first, second, _ in RULES
    }
