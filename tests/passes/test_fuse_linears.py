"""Linears that read the same input become one; constant factors go into the weight."""

import numpy as np
import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.passes.fuse.linear_scale import FoldLinearScale
from planish.passes.fuse.merge_linears import MERGED_FROM, MERGED_WIDTHS, MergeLinears, merged_name
from planish.passes.infrastructure.rewriter import apply_rules, match_statistics

Arrays = dict[str, np.ndarray]


def model_of(signature: str, body: str, weights: Arrays) -> ir.Model:
    """A model whose weights carry module names; in ``body`` the dots are written ``__``."""
    text = f'<ir_version: 11, opset_import: ["" : 23]> g {signature} {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name.replace(".", "__")))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("__", ".")
    return model


def run(model: ir.Model, feeds: Arrays) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def random(*shape: int, seed: int = 0, dtype: type = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def attention_projections(biases: tuple[str, ...] = ("q", "k", "v"), widths=(8, 4, 4)) -> ir.Model:
    """Query, key and value projections, in float64, so that agreement is agreement of the formula."""
    lines, weights = [], {}
    for index, (role, width) in enumerate(zip("qkv", widths, strict=True)):
        weights[f"h.0.attn.{role}_proj.weight"] = random(6, width, seed=index)
        has_bias = role in biases
        lines.append(f"{role}{'p' if has_bias else ''} = MatMul(x, h__0__attn__{role}_proj__weight)")
        if has_bias:
            weights[f"h.0.attn.{role}_proj.bias"] = random(width, seed=10 + index)
            lines.append(f"{role} = Add({role}p, h__0__attn__{role}_proj__bias)")
    signature = "(double[b,s,6] x) => (double[b,s,8] q, double[b,s,4] k, double[b,s,4] v)"
    return model_of(signature, " ".join(lines), weights)


def merge(model: ir.Model, ignored: tuple[str, ...] = ()) -> int:
    return apply_rules(model, [MergeLinears(ignored.__contains__)])["merge-linears"]


@pytest.mark.parametrize("biases", [("q", "k", "v"), (), ("q", "v")], ids=["all", "none", "no key bias"])
def test_projections_of_different_widths_are_merged(biases):
    model, x = attention_projections(biases), random(2, 3, 6)
    before = run(model, {"x": x})
    assert merge(model) == 1
    assert ops(model) == ["MatMul", *["Add"][: len(biases)], "Split"]
    for new, old in zip(run(model, {"x": x}), before, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-13)  # float64: only the order of summation may differ
    weight = model.graph.initializers["h.0.attn.qkv_proj.weight"]
    assert weight.metadata_props[MERGED_FROM] == "h.0.attn.q_proj,h.0.attn.k_proj,h.0.attn.v_proj"
    assert weight.metadata_props[MERGED_WIDTHS] == "8,4,4"
    assert not any(name.startswith("h.0.attn.q_proj") for name in model.graph.initializers)
    assert [list(value.shape) for value in model.graph[-1].outputs] == [
        ["b", "s", 8],
        ["b", "s", 4],
        ["b", "s", 4],
    ]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_the_weights_are_put_together_only_when_read():
    model = attention_projections()
    reads = []

    def lazily(array: np.ndarray) -> ir.LazyTensor:
        def read() -> ir.TensorProtocol:
            reads.append(array.shape)
            return ir.tensor(array)

        return ir.LazyTensor(read, dtype=ir.DataType.DOUBLE, shape=ir.Shape(array.shape))

    for name, value in model.graph.initializers.items():
        if name.endswith("weight"):
            value.const_value = lazily(value.const_value.numpy())
    assert merge(model) == 1
    assert reads == []
    assert model.graph.initializers["h.0.attn.qkv_proj.weight"].const_value.numpy().shape == (6, 16)
    assert len(reads) == 3


def test_ignored_linears_stay_alone():
    model = attention_projections()
    assert merge(model, ignored=("h.0.attn.k_proj",)) == 1
    assert ops(model).count("MatMul") == 2
    assert "h.0.attn.qv_proj.weight" in model.graph.initializers
    assert "h.0.attn.k_proj.weight" in model.graph.initializers


@pytest.mark.parametrize(
    ("first", "second", "second_input"),
    [
        ("h.0.attn.q_proj", "h.1.attn.q_proj", "x"),  # Of two layers.
        ("h.0.attn.q_proj", "h.0.attn.k_proj", "z"),  # Of two inputs.
    ],
    ids=["two modules", "two inputs"],
)
def test_linears_that_do_not_belong_together(first, second, second_input):
    body = (
        f"y = MatMul(x, {first.replace('.', '__')}__weight)"
        f" u = MatMul({second_input}, {second.replace('.', '__')}__weight)"
    )
    model = model_of(
        "(double[n,6] x, double[n,6] z) => (double[n,4] y, double[n,4] u)",
        body,
        {f"{first}.weight": random(6, 4), f"{second}.weight": random(6, 4, seed=1)},
    )
    assert merge(model) == 0
    assert ops(model) == ["MatMul", "MatMul"]


def test_a_tied_weight_is_not_merged_and_the_reason_is_kept():
    body = "y = MatMul(x, m__a__weight) z = MatMul(x, m__b__weight) t = Transpose(m__a__weight)"
    model = model_of(
        "(double[n,6] x) => (double[n,4] y, double[n,4] z, double[4,6] t)",
        body,
        {"m.a.weight": random(6, 4), "m.b.weight": random(6, 4, seed=1)},
    )
    with match_statistics() as statistics:
        assert merge(model) == 0
    assert "it alone reads" in str(statistics["merge-linears"].misses)


def test_a_weight_that_is_an_input_is_not_merged():
    model = model_of(
        "(double[n,6] x, double[6,4] w) => (double[n,4] y, double[n,4] z)",
        "y = MatMul(x, w) z = MatMul(x, m__b__weight)",
        {"m.b.weight": random(6, 4)},
    )
    assert merge(model) == 0


def test_the_product_comes_before_its_first_reader():
    """The second linear stands behind a reader of the first: the merged product must stand before both."""
    model = model_of(
        "(double[n,6] x) => (double[n,4] r, double[n,4] z)",
        "y = MatMul(x, m__a__weight) r = Sigmoid(y) z = MatMul(x, m__b__weight)",
        {"m.a.weight": random(6, 4), "m.b.weight": random(6, 4, seed=1)},
    )
    before = run(model, {"x": random(5, 6)})
    assert merge(model) == 1
    assert ops(model) == ["MatMul", "Split", "Sigmoid"]
    for new, old in zip(run(model, {"x": random(5, 6)}), before, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-13)


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (["a.q_proj", "a.k_proj", "a.v_proj"], "a.qkv_proj"),
        (["a.gate_proj", "a.up_proj"], "a.gate_up_proj"),
        (["a.query", "a.key", "a.value"], "a.query_key_value"),
        (["a.q", "a.k"], "a.qk"),
        (["q_lin", "k_lin"], "qk_lin"),
        (["a.w1", "a.w3"], "a.w1_w3"),
        (["a.up_proj", "a.gate"], "a.up_proj_gate"),
    ],
)
def test_merged_names(names, merged):
    assert merged_name(names) == merged


def scaled_linear(op: str, constant: np.ndarray, bias: bool = True, swapped: bool = False) -> ir.Model:
    product = "p = MatMul(x, m__a__weight) l = Add(p, m__a__bias)" if bias else "l = MatMul(x, m__a__weight)"
    operands = "c, l" if swapped else "l, c"
    weights = {"m.a.weight": random(6, 4), "c": constant} | ({"m.a.bias": random(4, seed=1)} if bias else {})
    return model_of("(double[b,n,6] x) => (double[b,n,4] y)", f"{product} y = {op}({operands})", weights)


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(["Mul", "Div"]),
    shape=st.sampled_from([(), (1,), (4,), (1, 1, 4), (1, 1, 1)]),
    bias=st.booleans(),
    swapped=st.booleans(),
)
def test_a_factor_goes_into_the_weight(op, shape, bias, swapped):
    constant = random(*shape, seed=3) + 3.0
    model, x = scaled_linear(op, constant, bias, swapped and op == "Mul"), random(2, 3, 6)
    before = run(model, {"x": x})[0]
    assert apply_rules(model, [FoldLinearScale()]) == {"fold-linear-scale": 1}
    assert ops(model) == ["MatMul", "Add"] if bias else ["MatMul"]
    np.testing.assert_allclose(run(model, {"x": x})[0], before, rtol=1e-13)


@pytest.mark.parametrize(
    "model",
    [
        scaled_linear("Div", np.array(0.0)),
        scaled_linear("Mul", np.array(np.inf)),
        scaled_linear("Mul", np.ones((3, 1))),
        scaled_linear("Mul", np.ones((1, 1, 1, 4))),
        scaled_linear("Div", np.array(2.0), swapped=True),
    ],
    ids=["division by zero", "infinite", "one per row", "rank grows", "dividend"],
)
def test_factors_that_stay(model):
    before = ops(model)
    assert apply_rules(model, [FoldLinearScale()]) == {"fold-linear-scale": 0}
    assert ops(model) == before


def test_a_factor_behind_a_value_that_others_read_stays():
    model = model_of(
        "(double[n,6] x) => (double[n,4] y, double[n,4] l)",
        "l = MatMul(x, m__a__weight) y = Mul(l, c)",
        {"m.a.weight": random(6, 4), "c": np.array(2.0)},
    )
    assert apply_rules(model, [FoldLinearScale()]) == {"fold-linear-scale": 0}
