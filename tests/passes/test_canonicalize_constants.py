"""Constants, no-ops, dead code and shape arithmetic: what is rewritten, and a twin of each that must stay."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import get_target
from planish.ir import clone, verify
from planish.passes.canonicalize import Canonicalize
from planish.passes.canonicalize.constant_folding import fold_constants
from planish.passes.canonicalize.dead_code import merge_common_subexpressions, remove_dead_code
from planish.passes.canonicalize.functions import inline_functions
from planish.passes.canonicalize.no_ops import remove_no_ops
from planish.passes.infrastructure.base import PassContext
from planish.runtime.reference import run_model

LIMIT = 1 << 20


def model_of(text: str, opset: int = 23, functions: str = "") -> ir.Model:
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "my" : 1, "planish" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(header + text + functions))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def canonicalize(model: ir.Model, **options: object) -> dict[str, int]:
    result = Canonicalize(**options).run(model, PassContext(target=get_target("portable")))
    return dict(result.statistics)


def assert_same_outputs(before: ir.Model, after: ir.Model, **feeds: np.ndarray) -> None:
    """Bit-identical: the rewrites of this module move or drop computations, they change none."""
    expected, found = run_model(before, feeds), run_model(after, feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert np.asarray(found[name]).dtype == np.asarray(array).dtype


FOLDABLE = {
    "Add": "r = Add(a, b)",
    "Cast": "r = Cast<to = 1>(a)",
    "CastLike": "r = CastLike(a, f)",
    "Concat": "r = Concat<axis = 0>(a, b)",
    "ConstantOfShape": "r = ConstantOfShape(b)",
    "Div": "r = Div(a, b)",
    "Equal": "r = Equal(a, b)",
    "Expand": "r = Expand(a, w)",
    "Gather": "r = Gather<axis = 0>(a, i)",
    "Max": "r = Max(a, b, i)",
    "Mod": "r = Mod(a, b)",
    "Mod with fmod": "r = Mod<fmod = 1>(a, b)",
    "Mul": "r = Mul(f, f)",
    "Pow": "r = Pow(f, f)",
    "Range": "r = Range(s, t, o)",
    "Reciprocal": "r = Reciprocal(f)",
    "ReduceProd": "r = ReduceProd<keepdims = 0>(a)",
    "Reshape": "r = Reshape(a, w)",
    "Shape": "r = Shape<start = -1>(f)",
    "Size": "r = Size(f)",
    "Slice": "r = Slice(a, z, o1)",
    "Sqrt": "r = Sqrt(f)",
    "Sub": "r = Sub(a, b)",
    "Tile": "r = Tile(a, o1)",
    "Transpose": "m = Reshape(a, w) r = Transpose(m)",
    "Unsqueeze": "r = Unsqueeze(a, z)",
    "Where": "c = Less(a, b) r = Where(c, a, b)",
}


@pytest.mark.parametrize("body", FOLDABLE.values(), ids=FOLDABLE)
def test_folded_constants_equal_what_the_runtime_computes(body):
    """Expand is to a shape that fits; negative operands of Div and Mod tell floor from truncation."""
    text = f"""g () => (y) <int64[3] a = {{-7, 7, 5}}, int64[3] b = {{2, 3, 4}}, float[2] f = {{0.5, 3}},
        int64[2] w = {{3, 1}}, int64[1] z = {{0}}, int64[1] o1 = {{2}}, int64[3] i = {{2, -1, 0}},
        int64 s = {{2}}, int64 t = {{11}}, int64 o = {{3}}>
        {{ {body} y = Identity(r) }}"""
    before = model_of(text)
    after = clone(before)
    assert fold_constants(after, limit=LIMIT)["constants-folded"] >= 1
    assert ops(after) == ["Identity"]
    assert_same_outputs(before, after)


NOT_FOLDABLE = {
    "random": "r = RandomUniform<shape = [2]>()",
    "not constant": "r = Add(x, f)",
    "an initializer that callers may override": "r = Add(d, f)",
    "quantised weight": "r = DequantizeLinear(q, scale)",
    "integer division by zero": "e = Div(a, zeros) r = Cast<to = 1>(e)",
    "cast out of range": "e = Cast<to = 3>(huge) r = Cast<to = 1>(e)",
    "too large": "e = ConstantOfShape(large) r = ReduceMax<keepdims = 0>(e)",
    "float range": "r = Range(rs, rt, ro)",
    "several outputs": "r, s = Split<num_outputs = 2>(f)",
}


@pytest.mark.parametrize("body", NOT_FOLDABLE.values(), ids=NOT_FOLDABLE)
def test_what_must_not_be_folded_stays(body):
    text = f"""g (float[2] x, float[2] d) => (y) <float[2] d = {{1, 2}}, float[2] f = {{0.5, 3}},
        int8[2] q = {{1, 2}}, float scale = {{0.5}}, int64[2] a = {{1, 2}}, int64[2] zeros = {{0, 1}},
        float[2] huge = {{300, 1e30}}, int64[2] large = {{4096, 4096}},
        float rs = {{0}}, float rt = {{1}}, float ro = {{0.1}}>
        {{ {body} y = Identity(r) }}"""
    model = model_of(text)
    before = ops(model)
    fold_constants(model, limit=LIMIT)
    assert ops(model) == before


def test_a_sizeable_result_larger_than_its_operands_is_not_stored():
    """An int8 weight that is expanded by Cast stays int8 in the file; a small table may grow."""
    weight = ir.tensor(np.ones((512, 512), np.int8), name="w")
    model = model_of("g (float[512] x) => (y) <int8[1] w = {1}> { f = Cast<to = 1>(w) y = Add(x, f) }")
    value = model.graph.initializers["w"]
    value.const_value, value.shape = weight, ir.Shape([512, 512])
    assert fold_constants(model, limit=LIMIT)["constants-folded"] == 0
    assert ops(model) == ["Cast", "Add"]


def test_constants_are_lifted_pooled_and_kept_where_they_are_outputs():
    model = model_of("""g (float[2] x) => (y, k) {
        a = Constant<value_float = 2.0>() b = Constant<value_float = 2.0>() k = Constant<value_int = 7>()
        z = Mul(x, a) y = Mul(z, b) }""")
    assert fold_constants(model, limit=LIMIT)["constants-lifted"] == 2
    assert ops(model) == ["Constant", "Mul", "Mul"]
    assert list(model.graph.initializers) == ["a"]


def test_old_opsets_are_left_alone():
    model = model_of(
        "g () => (y) <float[1] a = {1}> { u = Unsqueeze<axes = [0]>(a) y = Identity(u) }", opset=12
    )
    assert fold_constants(model, limit=LIMIT)["constants-folded"] == 0


def test_constants_inside_a_branch_are_folded_there():
    before = model_of("""g (bool c, float[2] x) => (float[2] y) { y = If(c) <
        then_branch = t () => (float[2] r) { a = Constant<value_float = 2.0>() b = Add(a, a) r = Mul(x, b) },
        else_branch = e () => (float[2] r2) { r2 = Identity(x) }> }""")
    after = clone(before)
    canonicalize(after)
    branch = after.graph[0].attributes["then_branch"].as_graph()
    assert [node.op_type for node in branch] == ["Mul"]
    for condition in (True, False):
        x = np.array([1, -3], np.float32)
        assert_same_outputs(before, after, c=np.array(condition), x=x)


NO_OPS = {
    "identity": "r = Identity(x)",
    "inference dropout": "r = Dropout(x)",
    "cast to the same type": "r = Cast<to = 1>(x)",
    "cast like the same type": "r = CastLike(x, x)",
    "there and back through a wider type": "e = Cast<to = 11>(x) r = Cast<to = 1>(e)",
    "times one": "r = Mul(one, x)",
    "divided by one": "r = Div(x, one)",
    "integer plus zero": "e = Cast<to = 7>(x) n = Add(e, zero) r = Cast<to = 1>(n)",
    "transpose by the identity": "r = Transpose<perm = [0, 1]>(x)",
    "transposed twice": "e = Transpose(x) r = Transpose<perm = [1, 0]>(e)",
    "squeezed what was unsqueezed": "e = Unsqueeze(x, axis) r = Squeeze(e, axis)",
}
CONSTANTS = """float one = {1}, float[1,1,1] ones = {1}, float fzero = {0}, int64 zero = {0},
    int64[1] axis = {1}, int64[1] front = {0}, float[3] vector = {1, 1, 1}, bool train = {1},
    float ratio = {0.5}"""


@pytest.mark.parametrize("body", NO_OPS.values(), ids=NO_OPS)
def test_no_ops_are_removed(body):
    before = model_of(f"g (float[2,3] x) => (float[2,3] y) <{CONSTANTS}> {{ {body} y = Neg(r) }}")
    after = clone(before)
    canonicalize(after)
    expected = ["Cast", "Cast", "Neg"] if "to = 7" in body else ["Neg"]
    assert ops(after) == expected
    x = np.array([[1, -2, 3], [-0.0, 5, 1e30]], np.float32)
    assert_same_outputs(before, after, x=x)


NOT_NO_OPS = {
    "training dropout": "r = Dropout(x, ratio, train)",
    "dropout whose mask is read": "r, m = Dropout(x) k = Cast<to = 1>(m) s = Add(r, k)",
    "through a narrower type": "e = Cast<to = 10>(x) r = Cast<to = 1>(e)",
    "float plus zero, for minus zero": "r = Add(x, fzero)",
    "one that adds an axis": "r = Mul(x, ones)",
    "a vector of ones, the weight of a norm": "r = Mul(x, vector)",
    "one divided by x": "r = Div(one, x)",
    "a real transpose": "r = Transpose(x)",
    "squeezed elsewhere": "e = Unsqueeze(x, axis) f = Transpose<perm = [1, 0, 2]>(e) r = Squeeze(f, front)",
}


@pytest.mark.parametrize("body", NOT_NO_OPS.values(), ids=NOT_NO_OPS)
def test_what_does_something_stays(body):
    model = model_of(f"g (float[2,3] x) => (y) <{CONSTANTS}> {{ {body} y = Neg(r) }}")
    before = ops(model)
    remove_no_ops(model)
    assert ops(model) == before


def test_cast_like_becomes_cast_once_the_type_is_known():
    model = model_of("g (float16[2] h, int64[2] n) => (float16[2] y) { a = CastLike(n, h) y = Add(a, h) }")
    remove_no_ops(model)
    assert ops(model) == ["Cast", "Add"]


def test_nested_unsqueezes_become_one():
    before = model_of("""g (float[2,3] x) => (float[1,2,1,3,1] y)
        <int64[1] a = {1}, int64[2] b = {0, 4}> { u = Unsqueeze(x, a) y = Unsqueeze(u, b) }""")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Unsqueeze"]
    assert_same_outputs(before, after, x=np.arange(6, dtype=np.float32).reshape(2, 3))


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(6)), st.integers(1, 3), st.integers(1, 2))
def test_merged_unsqueezes_put_the_axes_in_the_same_places(order, inner_count, outer_count):
    rank = 2 + inner_count
    inner = sorted([axis for axis in order if axis < rank][:inner_count])
    outer = sorted([axis for axis in order if axis < rank + outer_count][:outer_count])
    before = model_of(f"""g (float[2,3] x) => (y)
        <int64[{len(inner)}] a = {{{str(inner)[1:-1]}}}, int64[{len(outer)}] b = {{{str(outer)[1:-1]}}}>
        {{ u = Unsqueeze(x, a) v = Unsqueeze(u, b) y = Neg(v) }}""")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Unsqueeze", "Neg"]
    assert_same_outputs(before, after, x=np.arange(6, dtype=np.float32).reshape(2, 3))


def test_graph_outputs_keep_their_names_and_their_producers():
    """An output may become another node's value, but never an input, an initializer or a second output."""
    before = model_of("""g (float[2] x) => (float[2] passed, float[2] first, float[2] second) {
        passed = Identity(x) n = Neg(x) first = Identity(n) second = Identity(n) }""")
    after = clone(before)
    canonicalize(after)
    assert [value.name for value in after.graph.outputs] == ["passed", "first", "second"]
    assert ops(after) == ["Identity", "Neg", "Identity"]
    assert_same_outputs(before, after, x=np.array([1, 2], np.float32))


def test_dead_code_goes_and_shared_computations_are_done_once():
    model = model_of("""g (float[2] x) => (float[2] y) <float[2] unused = {1, 2}> {
        dead = Exp(x) a = Sin(x) b = Sin(x) r = RandomNormalLike<seed = 1.0>(x)
        q = RandomNormalLike<seed = 1.0>(x) s = Add(a, b) t = Add(r, q) y = Add(s, t) }""")
    assert remove_dead_code(model)["dead-code-removed"] == 2
    assert merge_common_subexpressions(model)["common-subexpressions-merged"] == 1
    assert ops(model).count("Sin") == 1
    assert ops(model).count("RandomNormalLike") == 2


FUNCTIONS = """
<domain: "my", opset_import: ["" : 23]> Twice (a) => (b) { b = Add(a, a) }
<domain: "planish", opset_import: ["" : 23]> Thrice (a) => (b) { c = Add(a, a) b = Add(c, a) }"""


def test_foreign_functions_are_inlined_and_ours_are_not():
    before = model_of(
        "g (float[2] x) => (float[2] y) { t = my.Twice(x) y = planish.Thrice(t) }", functions=FUNCTIONS
    )
    after = clone(before)
    assert inline_functions(after) == {"functions-inlined": 1}
    assert ops(after) == ["Add", "Thrice"]
    assert_same_outputs(before, after, x=np.array([1, 2], np.float32))


RESHAPES = {
    "dimensions that are copied": (
        "s = Concat<axis = 0>(h, t, four, two)",
        [0, 0, 4, 2],
    ),
    "a dimension that is read elsewhere": (
        "k = Shape(z) s = Concat<axis = 0>(k, minus, two)",
        [0, -1, 2],
    ),
    "the one symbol that moved": (
        "p = Mul(h, t) s = Concat<axis = 0>(p, eight)",
        [-1, 8],
    ),
}


@pytest.mark.parametrize(("body", "shape"), RESHAPES.values(), ids=RESHAPES)
def test_symbolic_shapes_of_reshapes_become_constants(body, shape):
    before = model_of(f"""g (float[b,s,8] x, float[b] z) => (y)
        <int64[1] four = {{4}}, int64[1] two = {{2}}, int64[1] eight = {{8}}, int64[1] minus = {{-1}}>
        {{ h = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) {body}
        r = Reshape<allowzero = 1>(x, s) y = Neg(r) }}""")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Reshape", "Neg"]
    assert after.graph[0].inputs[1].const_value.numpy().tolist() == shape
    for batch, length in ((2, 3), (1, 1), (3, 5)):
        x = np.arange(batch * length * 8, dtype=np.float32).reshape(batch, length, 8)
        assert_same_outputs(before, after, x=x, z=np.zeros(batch, np.float32))


def test_a_moved_symbol_beside_a_copied_one_stays_computed():
    """Written −1 beside 0 ("copy"), the shape could not be resolved for an empty batch."""
    before = model_of("""g (float[b,2,s,8] x) => (y) <int64[1] sixteen = {16}> {
        h = Shape<start = 0, end = 1>(x) t = Shape<start = 2, end = 3>(x)
        s = Concat<axis = 0>(h, t, sixteen) r = Reshape(x, s) y = Neg(r) }""")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Shape", "Shape", "Concat", "Reshape", "Neg"]
    assert_same_outputs(before, after, x=np.zeros((2, 2, 3, 8), np.float32))
    assert_same_outputs(before, after, x=np.zeros((0, 2, 3, 8), np.float32))


def test_shapes_in_a_branch_and_around_it_have_names_of_their_own():
    before = model_of("""g (float[b,4,3] x, float[b] z, bool c) => (y, w)
        <int64[1] four = {4}, int64[1] two = {2}, int64[1] six = {6}> {
        n = Shape<start = 0, end = 1>(x) s = Concat<axis = 0>(n, two, six) y = Reshape(x, s)
        w = If(c) <
            then_branch = t () => (u) { m = Shape<start = 0, end = 1>(z) p = Concat<axis = 0>(m, two, six)
                                        u = Reshape(x, p) },
            else_branch = e () => (v) { k = Shape<start = 0, end = 1>(z) q = Concat<axis = 0>(k, two, six)
                                        r = Reshape(x, q) v = Neg(r) }> }""")
    after = clone(before)
    canonicalize(after)
    verify(after)
    feeds = {"x": np.arange(24, dtype=np.float32).reshape(2, 4, 3), "z": np.zeros(2, np.float32)}
    for condition in (True, False):
        assert_same_outputs(before, after, **feeds, c=np.array(condition))


def test_scalars_stay_scalars():
    before = model_of("""g (float x) => (y) <float c = {3.0}, int64[0] none = {}> {
        t = Transpose(c) e = Expand(t, none) y = Add(x, e) }""")
    after = clone(before)
    canonicalize(after)
    (constant,) = after.graph.initializers.values()
    assert constant.shape == ()
    assert_same_outputs(before, after, x=np.array(2, np.float32))


SHAPE_NO_OPS = {
    "reshape to its own shape": "s = Shape(x) r = Reshape(x, s)",
    "expand to its own shape": "s = Shape(x) r = Expand(x, s)",
    "expand to ones": "r = Expand(x, ones)",
    "slice of everything": "r = Slice(x, zero, end, axis)",
    "slice up to its own length": "t = Shape<start = 1, end = 2>(x) r = Slice(x, zero, t, axis)",
}


@pytest.mark.parametrize("body", SHAPE_NO_OPS.values(), ids=SHAPE_NO_OPS)
def test_shape_no_ops_are_removed(body):
    before = model_of(f"""g (float[b,s,8] x) => (y) <int64[2] ones = {{1, 1}}, int64[1] zero = {{0}},
        int64[1] end = {{9223372036854775807}}, int64[1] axis = {{1}}> {{ {body} y = Neg(r) }}""")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Neg"]
    assert_same_outputs(before, after, x=np.ones((2, 3, 8), np.float32))


SHAPE_OPS = {
    "another symbol": "t = Shape<start = 0, end = 1>(x) r = Slice(x, zero, t, axis)",
    "not from the start": "r = Slice(x, one, end, axis)",
    "not to the end": "r = Slice(x, zero, one, axis)",
    "every second": "r = Slice(x, zero, end, axis, two)",
    "expand to another shape": "s = Shape(z) r = Expand(x, s)",
}


@pytest.mark.parametrize("body", SHAPE_OPS.values(), ids=SHAPE_OPS)
def test_slices_and_expands_that_do_something_stay(body):
    before = model_of(f"""g (float[b,s,8] x, float[c,b,s,8] z) => (y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] axis = {{1}},
        int64[1] end = {{9223372036854775807}}>
        {{ {body} y = Neg(r) }}""")
    after = clone(before)
    canonicalize(after)
    assert len({"Slice", "Expand"} & set(ops(after))) == 1
    x = np.arange(80, dtype=np.float32).reshape(2, 5, 8)
    assert_same_outputs(before, after, x=x, z=np.zeros((3, 2, 5, 8), np.float32))


def test_expand_with_minus_one_is_decided_at_compile_time():
    """TorchScript exports ``x.expand(batch, −1, −1)`` as a choice made by Where at run time."""
    before = model_of("""g (float[b,4] x) => (float[b,1,3] y)
        <float[1,1,3] token = {1, 2, 3}, int64[1] minus = {-1}, int64[1] none = {-1}> {
        h = Shape<start = 0, end = 1>(x) s = Concat<axis = 0>(h, minus, none)
        n = Shape(s) ones = ConstantOfShape<value = int64[1] {1}>(n) m = Mul(ones, none) e = Equal(s, m)
        w = Where(e, ones, s) y = Expand(token, w) }""")
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Shape", "Concat", "Expand"]
    assert_same_outputs(before, after, x=np.zeros((3, 4), np.float32))


def test_canonicalizing_twice_changes_nothing_more():
    model = model_of(f"""g (float[b,s,4] x) => (y)
        <int64[1] two = {{2}}, float[4,4] w = {{{", ".join("1" * 16)}}}> {{
        h = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) s = Concat<axis = 0>(h, t, two, two)
        k = Transpose(w) m = MatMul(x, k) r = Reshape(m, s) i = Identity(r) y = Neg(i) }}""")
    assert canonicalize(model)
    once = ops(model)
    assert canonicalize(model) == {}
    assert ops(model) == once


def test_nothing_of_the_analysis_is_left_in_the_model():
    model = model_of("g (float[b,s] x) => (y) { s = Shape(x) y = Neg(s) }")
    canonicalize(model)
    assert not any(value.metadata_props for node in model.graph for value in node.outputs)
