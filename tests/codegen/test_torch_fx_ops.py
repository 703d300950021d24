"""Every lowered op against the node tests that onnx ships, and gradients against finite differences."""

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
import torch
from planish.codegen.torch_fx import OPS, lower, run
from planish.ir.errors import TargetError
from planish.runtime.reference import run_model

SLOW_MODULES = frozenset({"averagepool", "lppool", "maxpool"})
"""Modules of cases that take seconds to make."""
REFUSED = re.compile(
    r"float8|FLOAT8|float4|FLOAT4|INT4|INT2|e4m3|e5m2"  # element types that torch does not have
    r"|attention.*(padded_kv|nonpad|window)"  # Attention of opset 24 and 25
    r"|training|dropout.*mask|layer_normalization|with_argmax"  # training, and outputs that are not lowered
    r"|resize.*(cubic|antialias|axes|crop|symmetric|nearest|scales_linear|pytorch_half)|resize.*(larger|smaller)"
)
"""Cases that may be refused, by a `TargetError`; any other must agree."""
NO_CASES = {
    "AveragePool",
    "ConcatFromSequence",
    "MaxPool",
    "SequenceAt",
    "SequenceConstruct",
    "LayerNormalization",
}
"""Ops whose cases are slow, need further outputs or hold sequences: tested below."""
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


def model_of(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["": 23]> {text}'))


SINGLE = {
    "average pool of real elements": "m (float[2, 3, 7, 9] x) => (float[2, 3, m, n] y) "
    "{ y = AveragePool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1> (x) }",
    "average pool with the padding": "m (float[2, 3, 9] x) => (float[2, 3, m] y) "
    "{ y = AveragePool <kernel_shape = [5], pads = [2, 2], count_include_pad = 1> (x) }",
    "average pool, same": "m (float[2, 3, 7, 9] x) => (float[2, 3, m, n] y) "
    '{ y = AveragePool <kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_UPPER"> (x) }',
    "max pool, ceil mode": "m (float[2, 3, 7, 9] x) => (float[2, 3, m, n] y) "
    "{ y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], pads = [1, 0, 1, 1], ceil_mode = 1> (x) }",
    "max pool, same": "m (float[2, 3, 7, 9] x) => (float[2, 3, m, n] y) "
    '{ y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], auto_pad = "SAME_LOWER"> (x) }',
    "convolution, same": "m (float[1, 4, 7, 8] x, float[6, 2, 3, 3] w, float[6] b) => (float[1, 6, m, n] y) "
    '{ y = Conv <group = 2, strides = [2, 1], auto_pad = "SAME_UPPER"> (x, w, b) }',
    "layer normalization": "m (float[2, 3, 8] x, float[8] s, float[8] b) => (float[2, 3, 8] y) "
    "{ y = LayerNormalization <epsilon = 0.01> (x, s, b) }",
    "layer normalization of two axes": "m (float[2, 3, 8] x, float[3, 8] s) => (float[2, 3, 8] y) "
    "{ y = LayerNormalization <axis = 1> (x, s) }",
    "sequence": "m (float[4, 6] x) => (float[6, 4] y) { axis = Constant <value_int = 1> () "
    "sizes = Constant <value_ints = [1, 3, 2]> () s = SplitToSequence <axis = 1> (x, sizes) "
    "a = SequenceAt (s, axis) t = SequenceConstruct (a, a) j = ConcatFromSequence <axis = 1> (t) "
    "y = Transpose (j) }",
    "stacked": "m (float[4, 6] x) => (float[n, 4, 6] y) "
    "{ t = SequenceConstruct (x, x) y = ConcatFromSequence <axis = 0, new_axis = 1> (t) }",
    "parts of one size": "m (float[4, 6] x) => (float[4, 2] y) { at = Constant <value_int = -1> () "
    "size = Constant <value_int = 4> () s = SplitToSequence <axis = 1> (x, size) y = SequenceAt (s, at) }",
}


@pytest.mark.parametrize("text", SINGLE.values(), ids=SINGLE.keys())
def test_ops_without_node_tests_agree_with_onnxruntime(text: str) -> None:
    model = model_of(text)
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.standard_normal(v.shape.numpy()).astype(np.float32) for v in model.graph.inputs}
    expected, found = run_model(model, feeds)["y"], run(lower(model), feeds)["y"]
    # Float32 sums of up to 18 products of the order of 1, in two orders.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-5)


def normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


MASK = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
MASK[0, 0, 1] = False  # a query that sees nothing
POSITIONS = torch.tensor([[0, 2, 1], [3, 1, 0]])


@pytest.mark.parametrize(
    ("op_type", "operands", "attributes"),
    [
        ("Attention", (normal(2, 4, 3, 4), normal(2, 2, 3, 4), normal(2, 2, 3, 6)), {"is_causal": 1}),
        (
            "Attention",
            (normal(2, 3, 16), *[normal(2, 3, 8)] * 2, MASK, *[normal(2, 2, 2, 4)] * 2),
            {"q_num_heads": 4, "kv_num_heads": 2, "softcap": 1.5},
        ),
        ("RotaryEmbedding", (normal(2, 3, 8), normal(4, 2), normal(4, 2), POSITIONS), {"num_heads": 2}),
        ("RMSNormalization", (normal(2, 3, 8), normal(8)), {"stash_type": torch.float64}),
        ("LayerNormalization", (normal(2, 3, 8), normal(8), normal(8)), {"stash_type": torch.float64}),
        ("Gelu", (normal(3, 4),), {"approximate": "tanh"}),
        ("Gemm", (normal(3, 4), normal(5, 4), normal(5)), {"transB": 1, "alpha": 0.5}),
        ("Gather", (normal(4, 5), torch.tensor([[1, -1], [1, 0]])), {"axis": 1}),
        ("ScatterND", (normal(4, 5), torch.tensor([[1], [3]]), normal(2, 5)), {}),
        ("Softmax", (normal(3, 4),), {"axis": 0}),
    ],
)  # fmt: skip
def test_gradients_are_those_of_finite_differences(
    op_type: str, operands: tuple[torch.Tensor, ...], attributes: dict[str, Any]
) -> None:
    entry = OPS["", op_type]

    def first_result(*tensors: torch.Tensor) -> torch.Tensor:
        result = entry.function(*tensors, **attributes)
        return result[0] if entry.several else result

    assert torch.autograd.gradcheck(first_result, operands)
