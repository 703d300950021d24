"""Heads that are taken out of a merged projection are cut before it is split into heads."""

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest
from planish.passes.fuse.head_slices import SliceInsteadOfGatherND, SplitBeforeHeads
from planish.passes.infrastructure.rewriter import apply_rules


def model_of(body: str, inputs: str, outputs: str = "y") -> ir.Model:
    results = ", ".join(f"float[d{index}] {name}" for index, name in enumerate(outputs.split()))
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 23]> g ({inputs}) => ({results}) {{ {body} }}'
    )
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def apply(model: ir.Model, rule, x: np.ndarray) -> tuple[bool, list[str]]:
    """Whether the rule applied, and the ops that are left; results must not change."""
    before = run(model, x)
    applied = sum(apply_rules(model, [rule]).values()) > 0
    for new, old in zip(run(model, x), before, strict=True):
        np.testing.assert_array_equal(new, old)
    return applied, [node.op_type for node in model.graph]


HEADS = np.arange(2 * 3 * 6 * 4, dtype=np.float32).reshape(2, 3, 6, 4)
HEADS_INPUT = "float[b,s,6,4] x"


def gather(indices: str, *, then: str = "<perm = [1, 0, 2, 3]>") -> str:
    shape, values = indices.split("|")
    return (
        f"t = Transpose<perm = [2, 0, 1, 3]>(x) i = Constant<value = int64[{shape}] {{{values}}}>()"
        f" p = GatherND(t, i) y = Transpose{then}(p)"
    )


@pytest.mark.parametrize("indices", ["1,1|-1", "1,1|4", "2,1|3,4", "2,1|-2,-1", "6,1|0,1,2,3,4,5"])
@pytest.mark.parametrize("then", ["<perm = [1, 0, 2, 3]>", "<perm = [3, 2, 1, 0]>"])
def test_consecutive_heads_are_a_slice(indices, then):
    model = model_of(gather(indices, then=then), HEADS_INPUT)
    assert apply(model, SliceInsteadOfGatherND(), HEADS) == (True, ["Slice", "Transpose"])


@pytest.mark.parametrize(
    "body",
    [
        gather("2,1|0,2"),
        gather("2,1|1,0"),
        gather("2,1|-1,0"),
        gather("1,2|1,0", then="<perm = [1, 0, 2]>"),
        gather("1,1|1", then=""),
        gather("1,1|1") + " z = Abs(p)",
    ],
    ids=["gaps", "backwards", "around", "two axes", "no permutation", "read twice"],
)
def test_other_gathers_stay(body):
    model = model_of(body, HEADS_INPUT, "y z" if " z " in body else "y")
    applied, ops = apply(model, SliceInsteadOfGatherND(), HEADS)
    assert not applied
    assert "GatherND" in ops


def test_a_number_of_heads_that_is_not_known():
    model = model_of(gather("1,1|-1"), "float[b,s,n,4] x")
    assert not apply(model, SliceInsteadOfGatherND(), HEADS)[0]


MERGED = np.arange(2 * 3 * 24, dtype=np.float32).reshape(2, 3, 24)


def split(shape: str = "0, 0, 6, 4", sizes: str = "4, 1, 1", axis: int = 2, more: str = "") -> str:
    names = ["u", "v", "w"][: len(sizes.split(","))]
    reads = " ".join(f"y{name} = Abs({name})" for name in names)
    return (
        f"n = Constant<value_ints = [{shape}]>() h = Reshape(x, n)"
        f" k = Constant<value_ints = [{sizes}]>() {', '.join(names)} = Split<axis = {axis}>(h, k)"
        f" {reads} {more}"
    )


@pytest.mark.parametrize("axis", [2, -2])
def test_a_split_of_heads_is_one_of_the_projection(axis):
    model = model_of(split(axis=axis), "float[b,s,24] x", "yu yv yw")
    applied, ops = apply(model, SplitBeforeHeads(), MERGED)
    assert applied
    assert ops == ["Split", "Reshape", "Reshape", "Reshape", "Abs", "Abs", "Abs"]
    assert model.graph[0].inputs[1].const_value.numpy().tolist() == [16, 4, 4]


@pytest.mark.parametrize(
    ("body", "outputs", "sizes"),
    [
        (split(axis=3, sizes="2, 1, 1"), "yu yv yw", "b,s,24"),
        (split(axis=1, sizes="1, 1, 1"), "yu yv yw", "2,3,24"),
        (split("0, 3, 8, -1", sizes="4, 2, 2"), "yu yv yw", "b,s,24"),
        (split("3, 2, 6, 4"), "yu yv yw", "2,3,24"),
        (split(more="z = Abs(h)"), "yu yv yw z", "b,s,24"),
        (split("0, 0, 6, 2, 2"), "yu yv yw", "b,s,24"),
    ],
    ids=["along a head", "along the length", "length not kept", "other batch", "read twice", "five axes"],
)
def test_other_splits_stay(body, outputs, sizes):
    model = model_of(body, f"float[{sizes}] x", outputs)
    assert not apply(model, SplitBeforeHeads(), MERGED)[0]
