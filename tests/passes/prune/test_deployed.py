"""The model as it will be deployed: a clone with passes applied; texts that are no pipeline are refused."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir.errors import PipelineError
from planish.passes.infrastructure.base import Fact
from planish.passes.infrastructure.facts import set_facts
from planish.passes.prune.deployed import check_deployed_with, deployed

TEXT = """<ir_version: 11, opset_import: ["" : 23]>
g (float[n, 4] x) => (float[n, 4] y) { s = Sigmoid (x) y = Mul (x, s) }"""


def model():
    parsed = ir.from_proto(onnx.parser.parse_model(TEXT))
    set_facts(parsed, {Fact.CANONICAL})
    return parsed


def ops(found):
    return [node.op_type for node in found.graph]


def test_passes_are_applied_to_a_clone():
    original = model()
    changed = deployed(original, "canonicalize,fuse", get_target("portable"))
    assert Fact.FUSED in changed.meta["planish.facts"]
    assert Fact.FUSED not in original.meta["planish.facts"]
    assert ops(original) == ["Sigmoid", "Mul"]


def test_empty_text_changes_nothing():
    assert ops(deployed(model(), "", get_target("portable"))) == ["Sigmoid", "Mul"]


def test_order_of_passes_is_checked():
    parsed = model()
    set_facts(parsed, set())
    with pytest.raises(PipelineError, match="requires the fact 'canonical'"):
        deployed(parsed, "fuse", get_target("portable"))


def test_text_that_is_no_pipeline_names_the_option():
    with pytest.raises(PipelineError, match="drop-blocks: deployed_with: unknown pass 'fusse'"):
        check_deployed_with("fusse", "drop-blocks")
    check_deployed_with("fuse", "drop-blocks")
