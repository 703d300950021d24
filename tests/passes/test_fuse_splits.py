"""Consecutive parts of a tensor are cut by one Split, whatever they were cut with."""

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest
from planish.passes.fuse.splits import SPLIT_RULES
from planish.passes.infrastructure.rewriter import apply_rules

X = np.arange(2 * 3 * 10, dtype=np.float32).reshape(2, 3, 10)


def model_of(body: str, outputs: str = "float[b,s,p] y, float[b,s,q] z", width: int | str = 10) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 23]> g (float[b,s,{width}] x) => ({outputs}) {{ {body} }}'
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant<value_ints = {list(values)}>() "


def run(model: ir.Model) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": X})


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_split(model: ir.Model, sizes: list[int]) -> None:
    before = run(model)
    assert sum(apply_rules(model, SPLIT_RULES).values()) == 1
    (node,) = model.graph
    assert node.op_type == "Split"
    assert node.inputs[1].const_value.numpy().tolist() == sizes
    for new, old in zip(run(model), before, strict=True):
        np.testing.assert_array_equal(new, old)


AT = (
    "first = Constant<value_int = 0>() last = Constant<value_int = -1>()"
    " y = SequenceAt(p, first) z = SequenceAt(p, last)"
)
HALVES = "k = Constant<value_int = 5>() p = SplitToSequence<axis = -1>(x, k)"


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        (HALVES, [5, 5]),
        ("k = Constant<value_int = 4>() p = SplitToSequence<axis = 2>(x, k)", [4, 4, 2]),
        (ints("k", 7, 3) + "p = SplitToSequence<axis = -1>(x, k)", [7, 3]),
        ("p = SplitToSequence<axis = 2>(x)", [1] * 10),
    ],
)
def test_sequences(split, sizes):
    assert_split(model_of(f"{split} {AT}"), sizes)


@pytest.mark.parametrize(
    ("body", "outputs", "width"),
    [
        (
            f"{HALVES} {AT} n = SequenceLength(p)",
            "float[b,s,p] y, float[b,s,q] z, int64 n",
            10,
        ),
        (f"p = SplitToSequence<axis = -1, keepdims = 0>(x) {AT}", "float[b,s] y, float[b,s] z", 10),
        (
            f"k = Constant<value_int = 5>() p = SplitToSequence<axis = -1>(x, k) {AT}",
            "float[b,s,p] y, float[b,s,q] z",
            "w",
        ),
    ],
    ids=["another reader", "the axis is dropped", "unknown length"],
)
def test_sequences_that_stay(body, outputs, width):
    model = model_of(body, outputs, width)
    before = ops(model)
    assert not any(apply_rules(model, SPLIT_RULES).values())
    assert ops(model) == before


def slices(*bounds: tuple[int, int], step: int = 1) -> str:
    body = ints("axis", 2) + ints("step", step)
    for index, (start, end) in enumerate(bounds):
        body += ints(f"s{index}", start) + ints(f"e{index}", end)
        body += f"{'yzu'[index]} = Slice(x, s{index}, e{index}, axis, step) "
    return body


@pytest.mark.parametrize(
    ("bounds", "sizes"),
    [
        ([(0, 4), (4, 10)], [4, 6]),
        ([(6, 2**63 - 1), (0, 6)], [6, 4]),
        ([(0, -3), (-3, 2**31 - 1)], [7, 3]),
    ],
)
def test_slices(bounds, sizes):
    assert_split(model_of(slices(*bounds)), sizes)


@pytest.mark.parametrize(
    "body",
    [
        slices((0, 4), (5, 10)),
        slices((0, 4), (4, 9)),
        slices((0, 4), (3, 10)),
        slices((0, 4), (4, 10), step=2),
    ],
    ids=["gap", "not to the end", "overlap", "steps"],
)
def test_slices_that_stay(body):
    model = model_of(body)
    assert not any(apply_rules(model, SPLIT_RULES).values())
    assert ops(model) == ["Slice", "Slice"]


def test_three_slices_where_readers_stand_between_them():
    body = slices((0, 2), (2, 5), (5, 10)).replace("u = Slice", "v = Neg(z) u = Slice")
    model = model_of(body, "float[b,s,p] y, float[b,s,q] v, float[b,s,r] u")
    before = run(model)
    assert apply_rules(model, SPLIT_RULES)["split-instead-of-slices"] == 1
    assert ops(model) == ["Split", "Neg"]
    for new, old in zip(run(model), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_empty_parts_are_dropped():
    body = ints("s", 10) + ints("e", 2**31 - 1) + ints("axis", 2)
    body += "n = Slice(x, s, e, axis) c = Concat<axis = -1>(x, n) y = Neg(c)"
    model = model_of(body, "float[b,s,p] y")
    before = run(model)
    assert apply_rules(model, SPLIT_RULES)["drop-empty-parts"] == 1
    assert ops(model) == ["Neg"]
    np.testing.assert_array_equal(run(model)[0], before[0])


def test_parts_that_may_not_be_empty_stay():
    body = ints("s", 9) + ints("e", 2**31 - 1) + ints("axis", 2)
    body += "n = Slice(x, s, e, axis) c = Concat<axis = -1>(x, n) y = Neg(c)"
    model = model_of(body, "float[b,s,p] y")
    assert apply_rules(model, SPLIT_RULES)["drop-empty-parts"] == 0
