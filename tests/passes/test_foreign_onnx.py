"""A part of benchmarks/foreign_onnx.py: node tests of onnx still pass after loading and passes."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EVERY = 23
"""One test in so many, spread over all ops."""
ALWAYS = ("affine_grid_2d_expanded", "split_variable", "squeeze_negative", "layer_normalization_2d", "gelu")
"""Tests that have found defects, and ops that the passes rewrite."""


@pytest.fixture(scope="module")
def foreign_onnx() -> ModuleType:
    path = ROOT / "benchmarks" / "foreign_onnx.py"
    spec = importlib.util.spec_from_file_location("foreign_onnx", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_node_tests_still_pass(foreign_onnx: ModuleType, tmp_path: Path) -> None:
    spread = foreign_onnx.cases(every=EVERY)
    always = (case for part in ALWAYS for case in foreign_onnx.cases(part))
    outcomes = [
        foreign_onnx.check(case, foreign_onnx.STAGES, tmp_path) for case in itertools.chain(spread, always)
    ]
    failures = [o for o in outcomes if o.kind not in foreign_onnx.NOT_FAILURES]
    assert not failures, foreign_onnx.report(failures, 0)
    assert sum(o.kind == "passed" for o in outcomes) > 120
    # Conversion has to have happened: a model that is kept at its opset passes trivially.
    assert sum(o.kind == "passed" and o.converted for o in outcomes) > 120


@pytest.mark.slow
def test_a_wrong_answer_is_seen(foreign_onnx: ModuleType, tmp_path: Path) -> None:
    """The comparison can fail: the same model against outputs that are off by one."""
    case = next(foreign_onnx.cases("test_add"))
    wrong = foreign_onnx.dataclasses.replace(case, expected=[case.expected[0] + 1])
    with pytest.raises(AssertionError):
        foreign_onnx._compare(wrong, foreign_onnx.run(case.model.SerializeToString(), case.feeds))
    assert foreign_onnx.check(case, foreign_onnx.STAGES, tmp_path).kind == "passed"
