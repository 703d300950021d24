"""R2, R3 and R4: values, keys and the inputs of down projections, in the layouts that graphs spell."""

import numpy as np
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest
import scipy.linalg
from planish.codegen import get_target
from planish.ir import clone, format_model, infer_shapes, ops
from planish.passes.infrastructure.base import PassContext, PassResult
from planish.passes.rotate import Rotate

Arrays = dict[str, np.ndarray]
# Float64 sums of a few dozen products: a hundred times the rounding of one.
EXACT = 1e-13
WIDTH, HEADS, KV_HEADS, SIZE, INNER = 6, 4, 2, 4, 12
Q, KV = HEADS * SIZE, KV_HEADS * SIZE
H = scipy.linalg.hadamard(SIZE) / np.sqrt(SIZE)

rng = np.random.default_rng(0)
WEIGHTS = {
    "q.weight": rng.standard_normal((WIDTH, Q)),
    "k.weight": rng.standard_normal((WIDTH, KV)),
    "v.weight": rng.standard_normal((WIDTH, KV)),
    "v.bias": rng.standard_normal(KV),
    "qkv.weight": rng.standard_normal((WIDTH, Q + 2 * KV)),
    "qkv.bias": rng.standard_normal(Q + 2 * KV),
    # One stripe of queries, keys and values for each head, as in GPT-NeoX.
    "striped.weight": rng.standard_normal((WIDTH, 3 * Q)),
    "o.weight": rng.standard_normal((Q, WIDTH)),
    "up.weight": rng.standard_normal((WIDTH, INNER)),
    "down.weight": rng.standard_normal((INNER, WIDTH)),
}
INTEGERS = {
    "by_head": [0, 0, HEADS, SIZE],
    "by_kv_head": [0, 0, KV_HEADS, SIZE],
    "whole": [0, 0, Q],
    "stripes": [0, 0, HEADS, 3, SIZE],
    "widths": [Q, KV, KV],
    "second": [2],
    "zero": [0],
    "q_end": [Q],
    "k_end": [Q + KV],
    "v_end": [Q + 2 * KV],
}
SCALARS = {"first_item": 0, "second_item": 1, "third_item": 2, "eight": KV}
TURN = "Transpose <perm = [0, 2, 1, 3]>"
OUT = f"""
    at = {TURN} (a)
    merged = Reshape (at, whole)
    o = MatMul (merged, o__weight)
"""
SEPARATE = f"""
    qp = MatMul (x, q__weight) q4 = Reshape (qp, by_head) q = {TURN} (q4)
    kp = MatMul (x, k__weight) k4 = Reshape (kp, by_kv_head) k = {TURN} (k4)
    vm = MatMul (x, v__weight) vp = Add (vm, v__bias) v4 = Reshape (vp, by_kv_head) v = {TURN} (v4)
"""
PARTS = f"""
    q4 = Reshape (qp, by_head) q = {TURN} (q4)
    k4 = Reshape (kp, by_kv_head) k = {TURN} (k4)
    v4 = Reshape (vp, by_kv_head) v = {TURN} (v4)
"""
FUSED = "qkvm = MatMul (x, qkv__weight) qkv = Add (qkvm, qkv__bias)"
ATTENTION = "a = Attention (q, k, v)"
CACHED = "a, present_key, present_value = Attention (q, k, v, , past_key, past_value)"

LAYOUTS = {
    "separate": SEPARATE + ATTENTION + OUT,
    "split": f"{FUSED} qp, kp, vp = Split <axis = -1> (qkv, widths) {PARTS} {ATTENTION} {OUT}",
    "sliced": f"""{FUSED}
        qp = Slice (qkv, zero, q_end, second)
        kp = Slice (qkv, q_end, k_end, second)
        vp = Slice (qkv, k_end, v_end, second)
        {PARTS} {ATTENTION} {OUT}""",
    "striped": f"""
        s = MatMul (x, striped__weight) s5 = Reshape (s, stripes)
        q4 = Gather <axis = 3> (s5, first_item) q = {TURN} (q4)
        k4 = Gather <axis = 3> (s5, second_item) k = {TURN} (k4)
        v4 = Gather <axis = 3> (s5, third_item) v = {TURN} (v4)
        {ATTENTION} {OUT}""",
    "sequence": f"""
        qp = MatMul (x, q__weight)
        kvm = MatMul (x, qkv__weight)
        parts = SplitToSequence <axis = -1> (kvm, eight)
        kp = SequenceAt (parts, first_item)
        vp = SequenceAt (parts, second_item)
        {PARTS} {ATTENTION} {OUT}""",
    "three-dimensional": f"""
        q = MatMul (x, q__weight) k = MatMul (x, k__weight)
        vm = MatMul (x, v__weight) v = Add (vm, v__bias)
        a = Attention <q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}> (q, k, v)
        o = MatMul (a, o__weight)""",
    "tokens in one row": f"""
        rows = Reshape (x, flat_x)
        qm = MatMul (rows, q__weight) q4 = Reshape (qm, back_q) q = {TURN} (q4)
        km = MatMul (rows, k__weight) k4 = Reshape (km, back_k) k = {TURN} (k4)
        vm = MatMul (rows, v__weight) vb = Add (vm, v__bias) v4 = Reshape (vb, back_k) v = {TURN} (v4)
        {ATTENTION} {OUT}""",
}
VALUE_COLUMNS = {
    "split": ("qkv", np.arange(Q + KV, Q + 2 * KV).reshape(KV_HEADS, SIZE)),
    "sliced": ("qkv", np.arange(Q + KV, Q + 2 * KV).reshape(KV_HEADS, SIZE)),
    "sequence": ("qkv", np.arange(KV, 2 * KV).reshape(KV_HEADS, SIZE)),
    "striped": ("striped", np.arange(3 * Q).reshape(HEADS, 3, SIZE)[:, 2]),
}


def model_of(body: str, *, cached: bool = False, weights: Arrays = WEIGHTS, shape: str = "b,s") -> ir.Model:
    """A model from x [b, s, 6] to o; in ``body``, the dots of weights' names are written ``__``."""
    cache = f", double[b,{KV_HEADS},p,{SIZE}]"
    inputs = f"double[{shape},{WIDTH}] x" + (f"{cache} past_key{cache} past_value" if cached else "")
    outputs = f"double[{shape},{WIDTH}] o" + (
        ", double[] present_key, double[] present_value" if cached else ""
    )
    text = f'<ir_version: 11, opset_import: ["" : 23]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    integers = {name: np.array(value, np.int64) for name, value in {**INTEGERS, **SCALARS}.items()}
    integers |= {
        "flat_x": np.array([-1, WIDTH]),
        "back_q": np.array([2, 3, HEADS, SIZE]),
        "back_k": np.array([2, 3, KV_HEADS, SIZE]),
    }
    for name, array in (weights | integers).items():
        if name.replace(".", "__") in body:
            tensor = ir.to_proto(ir.tensor(array, name=name.replace(".", "__")))
            proto.graph.initializer.append(tensor)
    model = ir.from_proto(proto)
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("__", ".")
    for output in model.graph.outputs[1:]:
        output.shape = None
    infer_shapes(model)
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    model = clone(model)
    ops.inline(model)
    x = np.random.default_rng(1).standard_normal((2, 3, WIDTH))
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x, **feeds})


def rotate(model: ir.Model, *rotations: str, **options: object) -> tuple[PassResult, PassContext]:
    context = PassContext(target=get_target("portable"))
    return Rotate(rotations=rotations, **options).run(model, context), context


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def shape_of(layout: str) -> str:
    return "2,3" if layout == "tokens in one row" else "b,s"


def assert_same(after: np.ndarray, before: np.ndarray) -> None:
    np.testing.assert_allclose(after, before, rtol=0, atol=EXACT * np.abs(before).max())


@pytest.mark.parametrize("kind", ["hadamard", "random-matrix"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_turn_exactly_in_every_layout(layout, kind):
    model = model_of(LAYOUTS[layout], shape=shape_of(layout))
    before = run(model)[0]
    result, _ = rotate(model, "R2", kind=kind)
    assert str(result.coverage) == "1 of 1 rotations"
    assert np.abs(weight(model, "o.weight") - WEIGHTS["o.weight"]).max() > 0.1
    assert_same(run(model)[0], before)


def test_values_and_their_bias_turn_head_by_head_and_the_projection_back():
    model = model_of(LAYOUTS["separate"])
    rotate(model, "R2")
    blocks = np.kron(np.eye(KV_HEADS), H)
    np.testing.assert_allclose(weight(model, "v.weight"), WEIGHTS["v.weight"] @ blocks, atol=EXACT)
    np.testing.assert_allclose(weight(model, "v.bias"), WEIGHTS["v.bias"] @ blocks, atol=EXACT)
    np.testing.assert_allclose(
        weight(model, "o.weight"), np.kron(np.eye(HEADS), H.T) @ WEIGHTS["o.weight"], atol=EXACT
    )
    for name in ("q.weight", "k.weight"):
        np.testing.assert_array_equal(weight(model, name), WEIGHTS[name])


@pytest.mark.parametrize(("layout", "fused", "columns"), [(k, *v) for k, v in VALUE_COLUMNS.items()])
def test_only_the_values_of_a_fused_projection_turn(layout, fused, columns):
    model = model_of(LAYOUTS[layout])
    rotate(model, "R2")
    expected = WEIGHTS[f"{fused}.weight"].copy()
    expected[:, columns] = expected[:, columns] @ H
    np.testing.assert_allclose(weight(model, f"{fused}.weight"), expected, atol=EXACT)
    others = np.setdiff1d(np.arange(expected.shape[1]), columns)
    np.testing.assert_array_equal(
        weight(model, f"{fused}.weight")[:, others], WEIGHTS[f"{fused}.weight"][:, others]
    )


@pytest.mark.parametrize("layout", ["separate", "three-dimensional"])
def test_across_heads_a_transform_runs_before_the_projection(layout):
    model = model_of(LAYOUTS[layout])
    before = run(model)[0]
    rotate(model, "R2", across_heads=True)
    transforms = [node for node in model.graph if node.op_type == "HadamardTransform"]
    assert [node.outputs[0].consumers()[0].inputs[1].name for node in transforms] == ["o.weight"]
    across = np.kron(scipy.linalg.hadamard(HEADS) / 2, np.eye(SIZE)) @ np.kron(np.eye(HEADS), H)
    np.testing.assert_allclose(weight(model, "o.weight"), across.T @ WEIGHTS["o.weight"], atol=EXACT)
    assert_same(run(model)[0], before)


CACHE_SIZE = (2, KV_HEADS, 5, SIZE)


@pytest.mark.parametrize("rotation", ["R2", "R3"])
def test_the_cache_holds_what_is_rotated(rotation):
    model = model_of(SEPARATE + CACHED + OUT, cached=True)
    key, value = np.random.default_rng(2).standard_normal((2, *CACHE_SIZE))
    before = run(model, past_key=key, past_value=value)
    result, _ = rotate(model, rotation)
    turned = {"R2": (key, value @ H), "R3": (key @ H, value)}[rotation]
    after = run(model, past_key=turned[0], past_value=turned[1])
    assert_same(after[0], before[0])
    changed = {"R2": 2, "R3": 1}[rotation]
    assert result.redefined_outputs == {model.graph.outputs[changed].name}
    assert_same(after[changed], before[changed] @ H)
    assert_same(after[3 - changed], before[3 - changed])


@pytest.mark.parametrize("layout", ["separate", "striped", "three-dimensional"])
def test_queries_and_keys_are_transformed_alike(layout):
    model = model_of(LAYOUTS[layout])
    before = run(model)[0]
    result, _ = rotate(model, "R3")
    assert str(result.coverage) == "1 of 1 rotations"
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert [value.producer().op_type for value in attention.inputs[:2]] == ["HadamardTransform"] * 2
    assert_same(run(model)[0], before)


@pytest.mark.parametrize(("rotation", "cache"), [("R2", "value"), ("R3", "key")])
@pytest.mark.parametrize("end", ["past", "present"])
def test_a_cache_that_something_else_reads_stays(rotation, cache, end):
    model = model_of(SEPARATE + CACHED + OUT + f" more = Relu ({end}_{cache})", cached=True)
    before = format_model(model)
    result, _ = rotate(model, rotation)
    assert [skip.reason for skip in result.coverage.skipped] == ["Relu reads its cache too"]
    assert format_model(model) == before


@pytest.mark.parametrize("rotation", ["R2", "R3"])
def test_a_cache_that_is_computed_stays(rotation):
    body = "pk = Abs (past_key) pv = Abs (past_value)" + CACHED.replace("past_key, past_value)", "pk, pv)")
    model = model_of(SEPARATE + body + OUT, cached=True)
    result, _ = rotate(model, rotation)
    assert [skip.reason for skip in result.coverage.skipped] == ["its cache is not an input of the graph"]


MIXED = SEPARATE.replace(f"v4 = Reshape (vp, by_kv_head) v = {TURN} (v4)", "v = Reshape (vp, mixing)")
NOT_R2 = {
    "tokens and heads are mixed": (
        MIXED.replace("mixing", "by_mixed") + ATTENTION + OUT,
        "mixed between the projection and the attention",
    ),
    "an activation stands before the attention": (
        SEPARATE.replace("v4 = Reshape (vp", "r = Relu (vp) v4 = Reshape (r") + ATTENTION + OUT,
        "Relu stands between",
    ),
    "the values are read by something else": (
        SEPARATE + ATTENTION + OUT.replace("o = MatMul (merged", "w = Relu (v4) o = MatMul (merged"),
        "Relu reads the values too",
    ),
    "a slice of the values is read by something else": (
        LAYOUTS["sliced"] + " more = Slice (qkv, q_end, v_end, second)",
        "Slice reads the values too",
    ),
    "a gate stands before the projection": (
        SEPARATE + ATTENTION + OUT.replace("o = MatMul (merged", "m = Sigmoid (merged) o = MatMul (m"),
        "Sigmoid stands between",
    ),
    "the attention is read twice": (
        SEPARATE + ATTENTION + OUT + " more = Relu (a)",
        "more than the output projection reads",
    ),
    "the values come from no linear": (
        SEPARATE.replace("MatMul (x, v__weight)", "MatMul (x, computed)").replace(
            "vm =", "computed = Abs (v__weight) vm ="
        )
        + ATTENTION
        + OUT,
        "come from no linear",
    ),
    "the weight is shared": (
        SEPARATE + ATTENTION + OUT + " more = MatMul (x, v__weight)",
        "v.weight is shared",
    ),
}
INTEGERS["by_mixed"] = [0, KV_HEADS, -1, SIZE]


@pytest.mark.parametrize(("body", "reason"), NOT_R2.values(), ids=NOT_R2)
def test_values_stay(body, reason):
    model = model_of(body)
    before = format_model(model)
    result, _ = rotate(model, "R2")
    assert not result.modified
    (skip,) = result.coverage.skipped
    assert reason in skip.reason
    assert format_model(model) == before
    for name in ("v.weight", "qkv.weight", "o.weight"):
        if name in model.graph.initializers:
            np.testing.assert_array_equal(weight(model, name), WEIGHTS[name])


MLP = "u = MatMul (x, up__weight) h = Relu (u) d = MatMul (h, down__weight) o = Add (x, d)"


def test_down_projections_get_a_transform_that_their_weight_undoes():
    model = model_of(MLP)
    before = run(model)[0]
    result, _ = rotate(model, "R4")
    assert result.statistics["R4"] == 1
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu", "HadamardTransform", "MatMul", "Add"]
    down = weight(model, "down.weight")
    np.testing.assert_allclose(down.T @ down, WEIGHTS["down.weight"].T @ WEIGHTS["down.weight"], atol=EXACT)
    assert np.abs(down - WEIGHTS["down.weight"]).max() > 0.1
    np.testing.assert_array_equal(weight(model, "up.weight"), WEIGHTS["up.weight"])
    assert_same(run(model)[0], before)


def test_a_down_projection_behind_a_norm_is_found_and_that_of_the_attention_is_not():
    norm = "RMSNormalization <axis = -1> (d, q__weight)"
    attention = (SEPARATE + ATTENTION + OUT).replace("(x,", "(y,").replace("o = MatMul", "z = MatMul")
    body = f"""
        u = MatMul (x, up__weight) h = Relu (u) d = MatMul (h, down__weight)
        n = {norm.replace("q__weight", "post__weight")} y = Add (x, n) {attention} o = Add (y, z)
    """
    model = model_of(body, weights=WEIGHTS | {"post.weight": np.full(WIDTH, 2.0)})
    before = run(model)[0]
    result, _ = rotate(model, "R4")
    assert str(result.coverage) == "1 of 1 rotations"
    (transform,) = (node for node in model.graph if node.op_type == "HadamardTransform")
    assert transform.inputs[0].name == "h"
    assert_same(run(model)[0], before)


@pytest.mark.parametrize(
    ("inner", "tail", "reason"),
    [
        (9, "", "9 channels have no Hadamard matrix"),
        (12, " more = MatMul (u, down__weight)", "down.weight is shared"),
    ],
    ids=["odd width", "shared weight"],
)
def test_down_projections_stay(inner, tail, reason):
    weights = WEIGHTS | {
        "up.weight": rng.standard_normal((WIDTH, inner)),
        "down.weight": rng.standard_normal((inner, WIDTH)),
    }
    model = model_of(MLP + tail, weights=weights)
    before = format_model(model)
    result, _ = rotate(model, "R4")
    assert [reason in skip.reason for skip in result.coverage.skipped] == [True]
    assert format_model(model) == before


def test_a_model_without_blocks_or_attention_has_nothing_to_rotate():
    result, _ = rotate(model_of("u = MatMul (x, up__weight) o = MatMul (u, down__weight)"), "R2", "R3", "R4")
    assert result.coverage.total == 0
    assert result.coverage.required


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_in_narrow_types_the_rounding_of_the_transform_is_made_up_for(dtype):
    """1/√12 is not a float16: the transform's length differs from 1, and the weight takes that back."""
    weights = {name: array.astype(dtype) for name, array in WEIGHTS.items()}
    model = model_of(MLP, weights=weights)
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
    rotate(model, "R4")
    (transform,) = (node for node in model.graph if node.op_type == "HadamardTransform")
    factors = [value.const_value.numpy().astype(np.float64) for value in transform.inputs[1:]]
    whole = np.ones((1, 1))
    for factor in factors:
        whole = np.kron(whole, factor)
    product = whole @ weight(model, "down.weight").astype(np.float64)
    # What is left is the rounding of the weight itself: half a unit in the last place of its largest column.
    bound = np.finfo(dtype).eps * np.linalg.norm(WEIGHTS["down.weight"], axis=0).max()
    assert np.abs(product - weights["down.weight"].astype(np.float64)).max() <= bound
