"""Lowered ops against the node tests that onnx ships."""

from __future__ import annotations

import collections
import functools
import importlib
import pkgutil
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node as node_cases
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen.torch_fx import OPS, lower, run
from planish.ir.errors import TargetError

SLOW_MODULES = frozenset({"averagepool", "lppool", "maxpool"})
"""Modules of cases that take seconds to make."""
UNROUNDED = re.compile("resize_downsample_scales_.*_align_corners")
"""Cases that take the length of the output before it is rounded down; onnxruntime and torch take it after."""
REFUSED = re.compile(
    r"float8|FLOAT8|float4|FLOAT4|INT4|INT2|e4m3|e5m2"  # element types that torch does not have
    r"|attention.*(padded_kv|nonpad|window)"  # Attention of opset 24 and 25
    r"|training|dropout.*mask|layer_normalization|with_argmax"  # training, and outputs that are not lowered
    r"|spacetodepth.*mode|batchwise"  # SpaceToDepth of opset 28, layout of recurrent layers
)
"""Cases that may be refused, by a `TargetError`; any other must agree."""
NO_CASES = {
    "AveragePool",
    "ConcatFromSequence",
    "MaxPool",
    "LayerNormalization",
    "LpPool",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
}
"""Ops whose cases are slow, need further outputs or hold sequences."""
OPSET = 23
NATIVE = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8"})
STANDARD_OPS = sorted(op_type for domain, op_type in OPS if domain == "")


@functools.cache
def cases() -> dict[str, list[Any]]:
    """The cases that are a single node of native element types, by op type."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for module in pkgutil.iter_modules(node_cases.__path__):
            if module.name not in SLOW_MODULES:
                importlib.import_module(f"{node_cases.__name__}.{module.name}")
    found = collections.defaultdict(list)
    for case in node_cases._NodeTestCases:
        nodes = case.model.graph.node
        if len(nodes) == 1 and not case.name.endswith("_expanded") and _is_current(case):
            case.model.opset_import[0].version = OPSET  # ops of later opsets only have more types there
            found[nodes[0].op_type].append(case)
    return found


def _is_current(case: Any) -> bool:
    """Whether the case's op still means the same in the IR's opset."""
    (node,), opset = case.model.graph.node, case.model.opset_import[0].version
    if ("", node.op_type) not in OPS:
        return False
    versions = (onnx.defs.get_schema(node.op_type, each).since_version for each in (opset, max(OPSET, opset)))
    return len(set(versions)) == 1


def arrays(values: Sequence[Any]) -> list[Any]:
    return [onnx.numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else v for v in values]


def is_native(value: Any) -> bool:
    # Torch has 16-, 32- and 64-bit unsigned integers, but no arithmetic on them.
    values = value if isinstance(value, list) else [value]
    return all(np.asarray(v).dtype.str[1:] in NATIVE for v in values)


@pytest.mark.parametrize("op_type", [op_type for op_type in STANDARD_OPS if op_type not in NO_CASES])
def test_op_agrees_with_the_node_tests_of_onnx(op_type: str) -> None:
    agreed = 0
    for case in cases()[op_type]:
        if UNROUNDED.search(case.name):
            continue
        (inputs, outputs), *_ = case.data_sets
        inputs, outputs = arrays(inputs), arrays(outputs)
        if not all(map(is_native, (*inputs, *outputs))):
            continue
        names = [value.name for value in case.model.graph.input]
        try:
            got = run(lower(ir.from_proto(case.model)), dict(zip(names, inputs, strict=True)))
        except TargetError:
            assert REFUSED.search(case.name), case.name
            continue
        for value, expected in zip(case.model.graph.output, outputs, strict=True):
            assert_close(got[value.name], expected, case)
        agreed += 1
    assert agreed


def assert_close(found: Any, expected: Any, case: Any) -> None:
    if isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, case)
        return
    found = found.numpy()
    assert found.dtype == expected.dtype, case.name
    assert found.shape == expected.shape, case.name
    if expected.dtype.kind != "f":
        np.testing.assert_array_equal(found, expected, err_msg=case.name)
        return
    # The cases' own relative tolerance; sums are taken in another order, which shows in results near zero:
    # a few units in the last place of the terms, which are of the order of 1.
    absolute = 8 * float(np.finfo(expected.dtype).eps)
    np.testing.assert_allclose(found, expected, rtol=case.rtol, atol=absolute, err_msg=case.name)
