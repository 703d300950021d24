"""Attention and rotary embedding take over the split of the heads; masks lose what is always true."""

import collections

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest
from planish.passes.fuse.attention_layout import FlattenAttentionHeads
from planish.passes.fuse.attention_mask import MASK_RULES
from planish.passes.fuse.reshapes import CollapseReshapes
from planish.passes.infrastructure.rewriter import apply_rules, match_statistics

Arrays = dict[str, np.ndarray]
BATCH, LENGTH, PAST, HEADS, SIZE = 2, 5, 3, 4, 8

# Two kernels of one formula in float32, on values of order 1: a few roundings apart.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def model_of(text: str) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> {text}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def run(model: ir.Model, feeds: Arrays) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def attention_model(
    kv_heads: int = HEADS,
    *,
    past: bool = False,
    mask: str | None = None,
    rotary: bool = False,
    norm: str = "",
    causal: int = 0,
    body: str = "",
    outputs: str = "",
) -> ir.Model:
    """What an exporter writes: split the heads, move them to axis 1, attend, move them back, join them."""
    inputs = [f"float[b,s,{n * SIZE}] {name}" for name, n in (("q", HEADS), ("k", kv_heads), ("v", kv_heads))]
    lines = []
    for name, heads in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
        lines.append(
            f"{name}s = Constant<value_ints = [0, 0, {heads}, {SIZE}]>() {name}r = Reshape({name}, {name}s)"
        )
        lines.append(f"{name}0 = Transpose<perm = [0, 2, 1, 3]>({name}r)")
        steps = [step for step in (norm, "RotaryEmbedding(X, cosine, sine)" if rotary else "") if step]
        for index, step in enumerate(steps if name != "v" else []):
            lines.append(f"{name}{index + 1} = {step.replace('X', f'{name}{index}')}")
        last = lines.pop()
        lines.append(f"{name}t = {last.partition(' = ')[2]}")
    if norm:
        inputs += [f"float[{SIZE}] scale", f"float[{HEADS},1,{SIZE}] scales"]
    if rotary:
        inputs += [f"float[b,s,{SIZE // 2}] cosine", f"float[b,s,{SIZE // 2}] sine"]
    if mask:
        inputs.append(mask)
    if past:
        inputs += [f"float[b,{kv_heads},p,{SIZE}] pk, float[b,{kv_heads},p,{SIZE}] pv"]
    arguments = f"qt, kt, vt, {'mask' if mask else ''}" + (", pk, pv" if past else "")
    results = "a, nk, nv" if past else "a"
    declared = f"float[b,s,{HEADS * SIZE}] y" + (
        f", float[b,{kv_heads},t,{SIZE}] nk, float[b,{kv_heads},t,{SIZE}] nv" if past else ""
    )
    lines.append(f"{results} = Attention<is_causal = {causal}>({arguments.rstrip(', ')})")
    lines.append("at = Transpose<perm = [0, 2, 1, 3]>(a)")
    lines.append(f"js = Constant<value_ints = [0, 0, {HEADS * SIZE}]>() y = Reshape(at, js) {body}")
    model = model_of(f"g ({', '.join(inputs)}) => ({declared}{outputs}) {{ {' '.join(lines)} }}")
    return with_initializers(model)


def with_initializers(model: ir.Model) -> ir.Model:
    """Constants as initializers, as in the canonical form."""
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def feeds_of(model: ir.Model, lengths: dict[str, int] | None = None) -> Arrays:
    rng = np.random.default_rng(0)
    sizes = {"b": BATCH, "s": LENGTH, "p": PAST, "t": LENGTH + PAST, **(lengths or {})}
    feeds: Arrays = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim.value] for dim in value.shape]
        array = rng.standard_normal(shape)
        if value.dtype == ir.DataType.BOOL:
            feeds[value.name] = array > -0.5
            feeds[value.name][..., 0] = True  # No row without anything to attend to.
        else:
            feeds[value.name] = array.astype(value.dtype.numpy())
    return feeds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 1, "causal": 1},
        {"past": True, "causal": 1},
        {"past": True, "kv_heads": 2, "mask": "bool[b,1,s,t] mask"},
        {"mask": "float[s,s] mask"},
        {"mask": f"bool[b,{HEADS},s,s] mask"},
        {"rotary": True},
        {"norm": "RMSNormalization<axis = -1>(X, scale)", "rotary": True},
        {"norm": "LayerNormalization(X, scale)"},
        {"rotary": True, "past": True, "kv_heads": 2, "causal": 1},
    ],
    ids=str,
)
def test_heads_are_split_by_attention(options):
    model = attention_model(**options)
    feeds = feeds_of(model)
    before = run(model, feeds)
    hits = apply_rules(model, [FlattenAttentionHeads(), CollapseReshapes()])
    assert hits["flatten-attention-heads"] == 1
    remaining = collections.Counter(ops(model))
    norms = remaining["RMSNormalization"] + remaining["LayerNormalization"]
    assert norms == (2 if "norm" in options else 0)
    assert remaining["RotaryEmbedding"] == (2 if "rotary" in options else 0)
    # A norm needs the heads apart, so they are split in front of it and joined behind it.
    assert remaining["Reshape"] == 2 * norms
    assert remaining["Transpose"] == 0
    (attention,) = (node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes["q_num_heads"].as_int() == HEADS
    assert attention.attributes["kv_num_heads"].as_int() == options.get("kv_heads", HEADS)
    for new, old in zip(run(model, feeds), before, strict=True):
        np.testing.assert_allclose(new, old, **CLOSE)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"outputs": f", float[b,{HEADS},s,{SIZE}] a"},
        {"body": "z = Neg(a)", "outputs": f", float[b,{HEADS},s,{SIZE}] z"},
        {"body": "z = Neg(kt)", "outputs": f", float[b,{HEADS},s,{SIZE}] z"},
        {"outputs": f", float[b,{HEADS},s,{SIZE}] qt"},
        {"norm": "RMSNormalization<axis = -1>(X, scales)"},
        {"norm": "RMSNormalization<axis = 2>(X, scale)"},
    ],
    ids=[
        "result is an output",
        "result has another reader",
        "key has another reader",
        "query is an output",
        "a scale per head",
        "norm over positions",
    ],
)
def test_operands_and_results_that_others_read_keep_their_layout(options):
    model = attention_model(**options)
    before = ops(model)
    assert apply_rules(model, [FlattenAttentionHeads()]) == {"flatten-attention-heads": 0}
    assert ops(model) == before


def test_another_permutation_stays():
    text = """g (float[b,4,s,8] q, float[b,4,s,8] k, float[b,4,s,8] v) => (float[b,s,4,8] y) {
        kt = Transpose<perm = [0, 1, 2, 3]>(k) vt = Transpose<perm = [0, 1, 2, 3]>(v)
        qt = Transpose<perm = [0, 1, 2, 3]>(q)
        a = Attention(qt, kt, vt) y = Transpose<perm = [0, 2, 1, 3]>(a) }"""
    model = model_of(text)
    with match_statistics() as statistics:
        assert apply_rules(model, [FlattenAttentionHeads()]) == {"flatten-attention-heads": 0}
    assert "not the transpose" in str(statistics["flatten-attention-heads"].misses)


def test_an_unknown_number_of_heads_stays():
    text = """g (float[b,s,h,8] q, float[b,s,h,8] k, float[b,s,h,8] v) => (float[b,s,h,8] y) {
        qt = Transpose<perm = [0, 2, 1, 3]>(q) kt = Transpose<perm = [0, 2, 1, 3]>(k)
        vt = Transpose<perm = [0, 2, 1, 3]>(v)
        a = Attention(qt, kt, vt) y = Transpose<perm = [0, 2, 1, 3]>(a) }"""
    model = model_of(text)
    assert apply_rules(model, [FlattenAttentionHeads()]) == {"flatten-attention-heads": 0}


def reshape_model(first: list[int], second: list[int], shape: str = "b,s,32", extra: str = "") -> ir.Model:
    return with_initializers(
        model_of(
            f"""g (float[{shape}] x) => (float[d0,d1,d2] y) {{
            f = Constant<value_ints = {first}>() t = Constant<value_ints = {second}>()
            r = Reshape{extra}(x, f) y = Reshape(r, t) }}"""
        )
    )


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        ([0, 0, 4, 8], [0, 0, 32], None),
        ([0, 0, 4, 8], [0, -1, 8], [0, -1, 8]),
        ([2, 5, 4, 8], [0, 0, 16, 2], [2, 5, 16, 2]),
        ([-1, 32], [2, 5, 32], [2, 5, 32]),
        ([-1, 32], [5, 0, 2], [5, 32, 2]),
    ],
)
def test_reshapes_collapse(first, second, shape):
    model, feeds = reshape_model(first, second), {"x": np.arange(320, dtype=np.float32).reshape(2, 5, 32)}
    before = run(model, feeds)[0]
    assert apply_rules(model, [CollapseReshapes()])["collapse-reshapes"] > 0
    (node,) = model.graph
    assert node.op_type == ("Identity" if shape is None else "Reshape")
    if shape is not None:
        assert node.inputs[1].const_value.numpy().tolist() == shape
    np.testing.assert_array_equal(run(model, feeds)[0], before)


def test_a_copied_axis_whose_length_is_known_is_copied_from_the_source():
    model = reshape_model([0, -1, 4, 8], [0, 0, 32])
    split = model.graph[0].outputs[0]
    split.shape = ir.Shape(["b", "s", 4, 8])
    assert apply_rules(model, [CollapseReshapes()])["collapse-reshapes"] > 0
    assert ops(model) == ["Identity"]


def test_a_copied_axis_that_the_first_reshape_computes_stays():
    model = reshape_model([-1, 16], [0, 4, 4])
    assert apply_rules(model, [CollapseReshapes()]) == {"collapse-reshapes": 0}
    assert ops(model) == ["Reshape", "Reshape"]


def test_reshapes_that_mean_zero_as_zero_stay():
    model = reshape_model([0, 8, 4], [0, 4, 8], shape="0,s,32", extra="<allowzero = 1>")
    assert apply_rules(model, [CollapseReshapes()]) == {"collapse-reshapes": 0}


MASK = """g (int64[b,s] ids, int64[{mask_batch},s] attention_mask)
    => (bool[b,1,s,s] mask, bool[b,1,1,s] keys) {{
    zero = Constant<value_int = 0>() one = Constant<value_int = 1>() bound = Constant<value_int = {bound}>()
    last = Constant<value_ints = [-1]>() a123 = Constant<value_ints = [1, 2, 3]>()
    a013 = Constant<value_ints = [0, 1, 3]>() a012 = Constant<value_ints = [0, 1, 2]>()
    b1 = Shape<start = 0, end = 1>(ids) n = Squeeze(b1) s1 = Shape<start = 1, end = 2>(ids) l = Squeeze(s1)
    valid = Cast<to = 9>(attention_mask)
    rows = Range({start}, n, one) columns = Range(zero, l, one)
    row = Unsqueeze(rows, a123) query = Unsqueeze(columns, a013) key = Unsqueeze(columns, a012)
    seen = GreaterOrEqual(query, bound)
    both = Max(row, key) grid = Shape(both)
    row4 = Expand(row, grid) key4 = Expand(key, grid) r5 = Unsqueeze(row4, last) k5 = Unsqueeze(key4, last)
    index = Concat<axis = -1>({order})
    keys = GatherND(valid, index)
    mask = And(seen, keys)
}}"""


def mask_model(bound: int = 0, start: str = "zero", order: str = "r5, k5", mask_batch: str = "b") -> ir.Model:
    model = with_initializers(
        model_of(MASK.format(bound=bound, start=start, order=order, mask_batch=mask_batch))
    )
    # What shape inference with symbols says, written by hand: the onnx package's own does not follow Range.
    shapes = {
        "rows": ["b"],
        "columns": ["s"],
        "row": ["b", 1, 1, 1],
        "query": [1, 1, "s", 1],
        "key": [1, 1, 1, "s"],
        "index": ["b", 1, 1, "s", 2],
    }
    for node in model.graph:
        for value in node.outputs:
            if value.name in shapes:
                value.shape = ir.Shape(shapes[value.name])
    return model


@pytest.mark.parametrize("mask_batch", ["b", "other"], ids=["equal batch", "batch not provably equal"])
def test_an_encoder_mask_is_the_mask_of_the_keys(mask_batch):
    model = mask_model(mask_batch=mask_batch)
    feeds = {
        "ids": np.zeros((3, 6), np.int64),
        "attention_mask": np.array([[1] * 6, [1, 1, 0, 0, 0, 0], [1] * 6]),
    }
    before = run(model, feeds)
    hits = apply_rules(model, MASK_RULES)
    assert (hits["mask-drop-always-true"], hits["mask-select"]) == (1, 1)
    remaining = ops(model)
    assert not {"GatherND", "And", "GreaterOrEqual", "Max"} & set(remaining)
    assert ("Slice" in remaining) == (mask_batch == "other")
    for new, old in zip(run(model, feeds), before, strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_comparison_that_can_fail_stays():
    assert apply_rules(mask_model(bound=1), MASK_RULES)["mask-drop-always-true"] == 0


def test_a_grid_that_does_not_start_at_the_corner_stays():
    assert apply_rules(mask_model(start="one"), MASK_RULES)["mask-select"] == 0


def test_a_grid_of_swapped_axes_stays():
    assert apply_rules(mask_model(order="k5, r5"), MASK_RULES)["mask-select"] == 0


@pytest.mark.parametrize(("target", "kept"), [("b,1,s,s", False), ("b,4,s,s", True)], ids=["same", "larger"])
def test_an_expansion_to_the_same_shape_is_dropped(target, kept):
    model = model_of(
        f"""g (bool[b,1,s,s] m, int64[4] shape) => (bool[{target}] y) {{ e = Expand(m, shape) y = Not(e) }}"""
    )
    model.graph[0].outputs[0].shape = ir.Shape([int(d) if d.isdecimal() else d for d in target.split(",")])
    assert apply_rules(model, MASK_RULES)["mask-drop-expand"] == (not kept)
    assert ops(model) == (["Expand", "Not"] if kept else ["Not"])
