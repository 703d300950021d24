"""Views: what a transformer block is made of, and what is left out when a precondition does not hold."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planish.ir import clone, diff_models, infer_shapes, load
from planish.ir.ops import define, quantized_linear
from planish.ir.views import attentions, blocks, linears, norms, shared_inputs

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'

BLOCK = """
block (float[b, s, 8] x, float[b, 1, p, 4] pk, float[b, 1, p, 4] pv, float[b, 1, s, t] mask)
  => (float[b, s, 8] y, float[b, 1, t, 4] nk, float[b, 1, t, 4] nv)
<float[8] n1, float[8, 8] q, float[8] qb, float[8, 4] k, float[8, 4] v, float[8, 8] o,
 float[8] n2, float[8, 16] gate, float[8, 16] up, float[16, 8] down,
 int64[4] qs = {0, 0, 2, 4}, int64[4] ks = {0, 0, 1, 4}, int64[3] flat = {0, 0, 8}>
{
  h = RMSNormalization <axis = -1> (x, n1)
  qm = MatMul(h, q)  qa = Add(qm, qb)  qr = Reshape(qa, qs)  qt = Transpose <perm = [0, 2, 1, 3]> (qr)
  km = MatMul(h, k)  kr = Reshape(km, ks)  kt = Transpose <perm = [0, 2, 1, 3]> (kr)
  vm = MatMul(h, v)  vr = Reshape(vm, ks)  vt = Transpose <perm = [0, 2, 1, 3]> (vr)
  a, nk, nv = Attention(qt, kt, vt, mask, pk, pv)
  at = Transpose <perm = [0, 2, 1, 3]> (a)  ar = Reshape(at, flat)  om = MatMul(ar, o)
  x2 = Add(x, om)
  h2 = RMSNormalization <axis = -1> (x2, n2)
  g = MatMul(h2, gate)  sg = Sigmoid(g)  gs = Mul(g, sg)  u = MatMul(h2, up)  gu = Mul(gs, u)
  d = MatMul(gu, down)
  y = Add(d, x2)
}
"""


def graph(text: str) -> ir.Model:
    """Parse, give the weights without values random ones and names with dots, infer shapes."""
    model = onnx.parser.parse_model(HEADER + text)
    rng = np.random.default_rng(0)
    # What the text declares without a value is a value of the graph; no node makes it, so it is a weight.
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    result = load(model)
    for value in list(result.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            value.name = f"layer.{value.name}.weight"
    infer_shapes(result)
    return result


def test_linears_of_a_block() -> None:
    found = linears(graph(BLOCK))
    assert [(x.name, x.in_features, x.out_features) for x in found] == [
        ("layer.q", 8, 8),
        ("layer.k", 8, 4),
        ("layer.v", 8, 4),
        ("layer.o", 8, 8),
        ("layer.gate", 8, 16),
        ("layer.up", 8, 16),
        ("layer.down", 16, 8),
    ]
    q, k = found[:2]
    assert q.bias is not None
    assert (q.input.name, q.output.name, q.bias.name) == ("h", "qa", "layer.qb.weight")
    assert q.bias_node is q.output.producer()
    assert (k.bias, k.bias_node, k.output.name) == (None, None, "km")
    assert not q.is_quantized


def test_norms_of_a_block() -> None:
    first, second = norms(graph(BLOCK))
    assert (first.name, first.input.name, first.output.name) == ("layer.n1", "x", "h")
    assert [x.name for x in first.linears] == ["layer.q", "layer.k", "layer.v"]
    assert [x.name for x in second.linears] == ["layer.gate", "layer.up"]
    assert first.feeds_only_linears
    assert first.is_rms
    assert first.epsilon == pytest.approx(1e-5)


@pytest.mark.parametrize("reader", ["z = Neg(h)", "z = MatMul(w2, h)"])
def test_a_norm_that_something_else_reads(reader: str) -> None:
    text = f"""g (float[4, 4] x) => (float[4, 4] y, float[4, 4] z) <float[4] n, float[4, 4] w, float[4, 4] w2>
    {{ h = LayerNormalization(x, n)  y = MatMul(h, w)  {reader} }}"""
    (norm,) = norms(graph(text))
    assert [x.name for x in norm.linears] == ["layer.w"]
    assert not norm.feeds_only_linears
    assert not norm.is_rms


def test_shared_inputs_of_a_block() -> None:
    found = shared_inputs(graph(BLOCK))
    assert [(x.value.name, [y.name for y in x.linears]) for x in found] == [
        ("h", ["layer.q", "layer.k", "layer.v"]),
        ("h2", ["layer.gate", "layer.up"]),
    ]


def test_attention_of_a_block() -> None:
    (attention,) = attentions(graph(BLOCK))
    projections = (attention.q, attention.k, attention.v, attention.o)
    assert [x.name if x else None for x in projections] == ["layer.q", "layer.k", "layer.v", "layer.o"]
    assert (attention.num_heads, attention.kv_heads, attention.head_size) == (2, 1, 4)
    values = (attention.mask, attention.past_key, attention.past_value)
    assert [v.name if v else None for v in values] == ["mask", "pk", "pv"]
    presents = (attention.present_key, attention.present_value)
    assert [v.name if v else None for v in presents] == ["nk", "nv"]
    assert not attention.is_causal


def test_attention_without_a_cache_on_three_dimensions() -> None:
    text = """g (float[b, s, 8] x) => (float[b, s, 8] y)
    <float[8, 24] qkv, int64[3] parts = {8, 8, 8}, float[8, 8] o>
    { m = MatMul(x, qkv)  q, k, v = Split <axis = -1> (m, parts)
      a = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1> (q, k, v)  y = MatMul(a, o) }"""
    (attention,) = attentions(graph(text))
    assert attention.q is not None
    assert attention.q.name == "layer.qkv"
    assert attention.q == attention.k == attention.v
    assert attention.o is not None
    assert (attention.num_heads, attention.kv_heads, attention.head_size) == (2, 2, 4)
    assert (attention.past_key, attention.present_key, attention.mask) == (None, None, None)
    assert attention.is_causal


def test_attention_on_parts_of_a_sequence() -> None:
    text = """g (float[b, 1, s, 8] x) => (float[b, 1, s, 8] y)
    <float[8, 24] qkv, int64 part = {8}, int64 i = {0}, int64 j = {1}, int64 k = {2}>
    { m = MatMul(x, qkv)  parts = SplitToSequence <axis = -1> (m, part)
      q = SequenceAt(parts, i)  r = SequenceAt(parts, j)  s = SequenceAt(parts, k)
      y = Attention(q, r, s) }"""
    (attention,) = attentions(graph(text))
    assert attention.v is not None
    assert attention.v.name == "layer.qkv"
    assert attention.q == attention.k == attention.v


def test_attention_on_values_from_elsewhere() -> None:
    text = """g (float[b, 2, s, 4] q, float[b, 2, t, 4] k, float[b, 2, t, 4] v) => (float[b, 2, s, 4] y)
    { n = Neg(q)  a = Attention(n, k, v)  y = Neg(a) }"""
    (attention,) = attentions(graph(text))
    assert (attention.q, attention.k, attention.v, attention.o) == (None, None, None, None)


def test_blocks_of_a_layer() -> None:
    first, second = blocks(graph(BLOCK))
    assert (first.input.name, first.output.name, first.branch.name) == ("x", "x2", "om")
    assert (second.input.name, second.output.name, second.branch.name) == ("x2", "y", "d")
    assert [x.name for x in first.linears] == ["layer.q", "layer.k", "layer.v", "layer.o"]
    assert [x.name for x in second.linears] == ["layer.gate", "layer.up", "layer.down"]
    assert first.has_attention
    assert not second.has_attention
    assert first.nodes[0].op_type == "RMSNormalization"
    assert first.nodes[-1].outputs[0] is first.branch


@pytest.mark.parametrize(
    "body",
    [
        "u = Neg(x)  v = Abs(x)  y = Add(u, v)",  # two branches, no stream between them
        "c = Neg(w)  y = Add(x, c)",  # a bias
        "y = Add(x, x)",
        "c = Mul(x, x)  y = Add(x, c)",  # the beginning of a GELU
        "m = ReduceMean <keepdims = 1>(x, axis)  y = Add(x, m)",  # another width
    ],
)
def test_adds_that_are_no_residuals(body: str) -> None:
    text = f"""g (float[b, s, 8] x) => (float[b, s, 8] y, float[b, s, 8] z)
    <float[8] w, int64[1] axis = {{-1}}> {{ {body}  z = Relu(x) }}"""
    assert blocks(graph(text)) == []


def test_a_convolutional_block_goes_by_its_channels() -> None:
    text = """g (float[n, 4, h, w] x) => (float[n, 4, h, w] y) <float[4, 4, 3, 3] k>
    { c = Conv <pads = [1, 1, 1, 1]> (x, k)  r = Relu(c)  y = Add(r, x) }"""
    (block,) = blocks(graph(text))
    assert [node.op_type for node in block.nodes] == ["Conv", "Relu"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("y = MatMul(x, w)", ["layer.w"]),
        ("y = Gemm(x, w)", ["layer.w"]),
        ("y = Gemm <transB = 1> (x, w)", ["layer.w"]),
        ("y = Gemm(x, w, b)", ["layer.w"]),
        ("y = MatMul(w, x)", []),
        ("y = MatMul(x, x)", []),
        ("y = Gemm <alpha = 2.0> (x, w)", []),
        ("y = Gemm <transA = 1> (x, w)", []),
        ("y = Gemm(x, w, x)", []),
        ("t = Identity(w)  y = MatMul(x, t)", []),
    ],
)
def test_what_is_a_linear(body: str, expected: list[str]) -> None:
    text = f"g (float[4, 4] x) => (float[4, 4] y) <float[4, 4] w, float[4] b> {{ {body} }}"
    assert [x.name for x in linears(graph(text))] == expected


def test_gemm_says_how_its_weight_lies() -> None:
    text = (
        "g (float[n, 3] x) => (float[n, 5] y) <float[5, 3] w, float[5] b> { y = Gemm <transB = 1> (x, w, b) }"
    )
    (linear,) = linears(graph(text))
    assert (linear.in_features, linear.out_features, linear.transposed) == (3, 5, True)
    assert linear.bias_node is linear.node


@pytest.mark.parametrize(
    "body",
    [
        "m = MatMul(x, w)  y = Add(m, x)",  # a residual
        "m = MatMul(x, w)  y = Add(m, row)",  # a constant of another shape
        "m = MatMul(x, w)  y = Add(m, b)  z = Neg(m)",  # the product has another reader
        "m = MatMul(x, w)  y = Sub(m, b)",
    ],
)
def test_what_is_no_bias(body: str) -> None:
    outputs = "float[4, 4] y" + (", float[4, 4] z" if "z =" in body else "")
    text = f"g (float[4, 4] x) => ({outputs}) <float[4, 4] w, float[4] b, float[1, 4] row> {{ {body} }}"
    (linear,) = linears(graph(text))
    assert linear.bias is None
    assert linear.output.name == "m"


def test_a_weight_that_callers_can_override_is_no_constant() -> None:
    text = "g (float[4, 4] x) => (float[4, 4] y) <float[4, 4] w> { y = MatMul(x, w) }"
    model = graph(text)
    model.graph.inputs.append(model.graph.initializers["layer.w.weight"])
    assert linears(model) == []


def test_quantised_linears_are_linears() -> None:
    model = graph("g (float[n, 4] x) => (float[n, 2] y) { t = Neg(x)  y = Identity(t) }")
    arrays = {"fc.weight": np.ones((4, 2), np.int8), "fc.scale": np.ones(2, np.float32)}
    values = {
        name: ir.Value(
            name=name,
            const_value=ir.tensor(array),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        )
        for name, array in arrays.items()
    }
    for value in values.values():
        model.graph.register_initializer(value)
    node, definition = quantized_linear(
        model.graph[0].outputs[0], values["fc.weight"], values["fc.scale"], bits=8, name="fc"
    )
    define(model, definition)
    model.graph.insert_after(model.graph[0], node)
    (linear,) = linears(model)
    assert linear.is_quantized
    assert (linear.name, linear.in_features, linear.out_features) == ("fc", 4, 2)


def test_views_change_nothing() -> None:
    model = graph(BLOCK)
    copy = clone(model)
    for view in (linears, norms, shared_inputs, attentions, blocks):
        view(model)
    assert not diff_models(copy, model)
