"""A short run of the fuzzer, and that it would find something: `benchmarks/fuzz.py` runs thousands."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import microbenchmark
from planish.passes.infrastructure import registry
from planish.passes.infrastructure.base import Contract, Pass, PassContext, PassResult
from planish.passes.infrastructure.pipeline import Pipeline

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SEEDS = range(16)


@pytest.fixture(scope="module", autouse=True)
def _benchmarks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Which kernel is the fastest does not matter: a few runs of each are enough."""
    monkeypatch.setattr(microbenchmark, "_SECONDS_PER_CANDIDATE", 0)
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def module(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.parametrize("seed", SEEDS)
def test_cases(seed: int) -> None:
    fuzz_case = module("fuzz_case")
    outcome = fuzz_case.run_case(fuzz_case.Case(seed=seed, traced=False))
    assert not outcome.failure, outcome.trace or outcome.failure


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_model_follows_from_its_seed(seed: int) -> None:
    random_model = module("random_models").random_model
    model, again = (random_model(seed, traced=False) for _ in range(2))
    assert model.proto.SerializeToString() == again.proto.SerializeToString()
    run = module("fuzz_case").plain_session(model.proto)
    for feeds_seed in range(2):
        for array in run(model.feeds(feeds_seed)).values():
            assert np.isfinite(array).all()
    part = random_model(seed, only=range(1), traced=False)
    assert list(part.blocks) == list(model.blocks[:1])
    module("fuzz_case").plain_session(part.proto)(part.feeds(0))


def test_every_pass_is_drawn() -> None:
    assert set(module("random_pipelines").OPTIONS) == set(registry.available())


@dataclass(frozen=True, kw_only=True)
class Wrong(Pass):
    """Adds a hundredth to one weight, and says that this is exact or that it errs less than it does."""

    name: ClassVar[str] = "wrong"
    by: float = 0.01

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        del ctx
        for name, value in model.graph.initializers.items():
            if value.const_value is not None and len(value.const_value.shape) == 2:
                array = value.const_value.numpy()
                value.const_value = ir.tensor((array * (1 + self.by)).astype(array.dtype), name=name)
        return PassResult(modified=True)


@dataclass(frozen=True, kw_only=True)
class Approximate(Wrong):
    """The same, said to be approximate."""

    name: ClassVar[str] = "approximate"
    contract: ClassVar[Contract] = Contract.APPROXIMATE


@dataclass(frozen=True, kw_only=True)
class Crashing(Wrong):
    """Raises what nobody foresaw."""

    name: ClassVar[str] = "crashing"

    def run(self, model: ir.Model, ctx: PassContext) -> PassResult:
        raise KeyError("axis")


def case_with(*passes: Any, seed: int = 2) -> Any:
    pipeline = Pipeline.of(["canonicalize", "fuse", *passes, "RemoveUnusedNodesPass"])
    return module("fuzz_case").Case(seed=seed, pipeline=pipeline, traced=False)


def test_a_wrong_pass_is_found_and_the_case_made_smaller() -> None:
    fuzz_case = module("fuzz_case")
    case = case_with(Wrong())
    outcome = fuzz_case.run_case(case)
    assert outcome.failure.startswith("ContractBrokenError: pass 'wrong' broke its contract")
    small, found = fuzz_case.smaller(case, outcome)
    assert [pass_.name for pass_ in small.pipeline] == ["wrong"]
    assert found.failure
    assert len(found.blocks) <= len(outcome.blocks)


def test_an_approximate_pass_may_change_what_it_reports() -> None:
    fuzz_case = module("fuzz_case")
    outcome = fuzz_case.run_case(case_with(Approximate()))
    assert not outcome.failure
    assert "approximate" in outcome.ran
    outcome = fuzz_case.run_case(case_with(Approximate(by=np.inf)))
    assert "no longer finite" in outcome.failure


def test_a_crash_is_told_with_its_place_and_a_refusal_with_its_reason() -> None:
    fuzz_case = module("fuzz_case")
    outcome = fuzz_case.run_case(case_with(Crashing()))
    assert outcome.failure.startswith("pass 'crashing': KeyError: 'axis'")
    outcome = fuzz_case.run_case(case_with("quantize{targets=[nothing]}"))
    assert not outcome.failure
    (refusal,) = outcome.refusals
    assert (refusal.name, refusal.reason) == ("quantize", "covered nothing: not a target")
    assert "quantize" not in outcome.ran


def test_the_table() -> None:
    fuzz, fuzz_case = module("fuzz"), module("fuzz_case")
    good = fuzz_case.Outcome(
        family="rows", blocks=(), pipeline="canonicalize", target="portable", ran=("canonicalize",),
        refusals=(fuzz_case.Refusal(name="rotate", reason="covered nothing"),), is_exact=True, error=0.5,
    )  # fmt: skip
    rows = [
        {"seed": seed, **fuzz.dataclasses.asdict(outcome), "again": f"--case {seed}"}
        for seed, outcome in enumerate([good, replace(good, failure="it is wrong")])
    ]
    text = fuzz.report(rows)
    assert "**1 failures.** In 2 cases" in text
    assert "| rows | 2 | 2 | 0 | 2 | 1 |" in text
    assert "| canonicalize | 2 | 0 |" in text
    assert "| rotate | 2 | covered nothing |" in text
    assert "| 1 | `--case 1` | it is wrong |" in text
