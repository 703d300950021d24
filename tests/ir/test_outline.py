"""Outlines: blocks, layers, how these are stored, and that they survive as JSON."""

from __future__ import annotations

import json

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import planish
import pytest
from planish.ir import infer_shapes, load
from planish.ir.outline import ModelOutline, outline

WIDTH = 8


def parsed(text: str, **weights: tuple[int, ...]) -> ir.Model:
    """A graph with random float weights of these shapes; double underscores in names are dots."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]>\n{text}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name.replace("__", ".")))
    model = load(proto)
    infer_shapes(model)
    return model


def decoder() -> ir.Model:
    """An embedding, one block of attention, one of an MLP, and a head."""
    square, wide = (WIDTH, WIDTH), (WIDTH, 2 * WIDTH)
    return parsed(
        """net (int64[b, s] ids) => (float[b, s, 3] y)
        { e = Gather("embed.weight", ids)
          q = MatMul(e, "layers.0.attn.q.weight")  k = MatMul(e, "layers.0.attn.k.weight")
          v = MatMul(e, "layers.0.attn.v.weight")
          a = Attention <q_num_heads = 1, kv_num_heads = 1> (q, k, v)
          o = MatMul(a, "layers.0.attn.o.weight")  r = Add(e, o)
          n = Relu(r)  u = MatMul(n, "layers.0.mlp.up.weight")
          g = Relu(u)  d = MatMul(g, "layers.0.mlp.down.weight")  t = Add(r, d)
          z = Relu(t)  y = MatMul(z, "lm_head.weight") }""",
        embed__weight=(50, WIDTH),
        **{f"layers__0__attn__{name}__weight": square for name in "qkvo"},
        layers__0__mlp__up__weight=wide,
        layers__0__mlp__down__weight=wide[::-1],
        lm_head__weight=(WIDTH, 3),
    )


def test_blocks_follow_the_residual_stream():
    found = outline(decoder()).blocks
    assert [(block.name, block.kind) for block in found] == [
        ("embed", "embedding"),
        ("layers.0.attn", "attention"),
        ("layers.0.mlp", "feed-forward"),
        ("lm_head", "other"),
    ]
    assert found[2].ops == {"Relu": 2, "MatMul": 2, "Add": 1}
    assert [layer.name for layer in found[1].layers] == [f"layers.0.attn.{name}" for name in "qkvo"]


def test_layers_say_what_they_are_and_how_they_are_stored():
    found = outline(decoder())
    table, *_, down, head = found.layers
    assert (table.kind, table.shape, table.stored_bytes) == ("embedding", (50, WIDTH), 50 * WIDTH * 4)
    assert (down.kind, down.shape, down.form, down.bits) == ("linear", (2 * WIDTH, WIDTH), "float32", 32)
    assert (down.weights, down.zeros, head.name) == (2 * WIDTH * WIDTH, None, "lm_head")
    assert found.weight_bytes == sum(layer.stored_bytes for layer in found.layers)


def test_a_transposed_gemm_is_shown_as_inputs_by_outputs():
    model = parsed(
        'net (float[b, 8] x) => (float[b, 3] y) { y = Gemm <transB = 1> (x, "fc.weight") }',
        fc__weight=(3, 8),
    )
    (layer,) = outline(model).layers
    assert layer.shape == (8, 3)


def test_convolutions_make_blocks_too():
    model = parsed(
        """net (float[b, 4, h, w] x) => (float[b, 4, h, w] y)
        { a = Conv <pads = [1, 1, 1, 1]> (x, "stem.weight")
          c = Conv <pads = [1, 1, 1, 1]> (a, "block.weight")  y = Add(a, c) }""",
        stem__weight=(4, 4, 3, 3),
        block__weight=(4, 4, 3, 3),
    )
    assert [(block.name, block.kind) for block in outline(model).blocks] == [
        ("stem", "convolution"),
        ("block", "convolution"),
    ]


def test_a_graph_without_a_residual_stream_is_one_block_and_one_without_layers_too():
    model = parsed(
        """net (float[b, 8] x) => (float[b, 8] y)
        { h = MatMul(x, "net.a.weight")  y = MatMul(h, "net.b.weight") }""",
        net__a__weight=(8, 8),
        net__b__weight=(8, 8),
    )
    (block,) = outline(model).blocks
    assert (block.name, block.kind, len(block.layers)) == ("net", "feed-forward", 2)
    (empty,) = outline(parsed("net (float[b] x) => (float[b] y) { y = Relu(x) }")).blocks
    assert (empty.name, empty.kind, empty.layers) == ("", "other", ())


@pytest.mark.parametrize(
    ("options", "form", "bits", "activation_bits"),
    [
        ("scheme=W4A16,group_size=16", "int4, groups of 16", 4, None),
        ("scheme=W3A16_ASYM,group_size=16", "uint3, groups of 16", 3, None),
        ("scheme=W8A8", "int8", 8, 8),
        ("scheme=W4A4", "int4", 4, 4),
        ("scheme=NF4,group_size=16", "4-bit code book, groups of 16", 4, None),
        ("scheme=FP8A16", "float8e4m3fn", 8, None),
    ],
)
def test_quantised_layers_say_how(options, form, bits, activation_bits):
    model = parsed(
        'net (float[b, 32] x) => (float[b, 16] y) { y = MatMul(x, "fc.weight") }', fc__weight=(32, 16)
    )
    compiled = planish.compile(model, f"canonicalize,quantize{{{options}}}", target="portable")
    (layer,) = outline(compiled.model).layers
    assert (layer.name, layer.form, layer.bits, layer.activation_bits) == ("fc", form, bits, activation_bits)
    assert layer.stored_bytes < 32 * 16 * 4


def test_outlines_survive_json_and_refuse_other_data():
    model = outline(decoder())
    assert ModelOutline.from_dict(json.loads(json.dumps(model.as_dict()))) == model
    for data in ({}, {"blocks": [{"name": "x"}], "weight_bytes": 0}, {"blocks": 3, "weight_bytes": 0}):
        with pytest.raises(planish.ModelError, match="no outline"):
            ModelOutline.from_dict(data)


def test_zeros_are_counted_on_asymmetric_grids_too():
    """Zero is where the zero point is: a fifth of these weights is set to it."""
    text = """<ir_version: 10, opset_import: ["": 21]>
        net (float[b, 32] x) => (float[b, 64] y) { y = MatMul(x, "fc.weight") }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).uniform(1, 2, (32, 64)).astype(np.float32)
    weight[: 32 // 4] = 0
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "fc.weight"))
    for scheme in ("W8A16", "W8A16_ASYM", "W4A16_ASYM"):
        passes = f"canonicalize,quantize{{scheme={scheme},group_size=32}}"
        compiled = planish.compile(proto, passes, target="portable")
        (found,) = outline(compiled.model, count_zeros=True).layers
        assert found.zeros == pytest.approx(0.25)
    assert outline(ir.from_proto(proto), count_zeros=True).layers[0].zeros == 0.25
