"""The stream against running the whole graph: the same values, each node once, little kept."""

from __future__ import annotations

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import planish
import pytest
import torch
from planish.ir import clone
from planish.ir.ops import replace
from planish.ir.views import linears
from planish.runtime.calibration import ActivationStream, Covariance
from planish.runtime.reference import run_model
from small_decoders import VOCABULARY, small_decoder

# Two residual blocks and a value, `shift`, that follows from the input alone.
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[n, s, 4] x, int64[n, s] attention_mask) => (float[n, s, 4] y)
{
  shift = Neg (x)
  a = MatMul (x, one)
  b = Relu (a)
  c = MatMul (b, two)
  d = Add (x, c)
  e = Add (d, shift)
  f = MatMul (e, three)
  y = Add (f, d)
}
"""
RNG = np.random.default_rng(0)
DATA = [
    {
        "x": RNG.standard_normal((2, 3, 4)).astype(np.float32),
        "attention_mask": np.array([[1, 1, 0], [1, 1, 1]]),
    }
    for _ in range(3)
]


def make_model() -> ir.Model:
    proto = onnx.parser.parse_model(TEXT)
    for seed, name in enumerate(("one", "two", "three")):
        array = np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return planish.ir.load(proto)


def values(stream: ActivationStream, name: str) -> list[np.ndarray]:
    return [tap.array(name) for tap in stream.advance([name])]


def test_values_are_those_of_the_whole_graph():
    model, stream = make_model(), None
    stream = ActivationStream(model, DATA)
    for name in ("x", "b", "d", "e", "y"):
        for found, feeds in zip(values(stream, name), DATA, strict=True):
            # The same float32 kernels on the same numbers, in graphs that are cut differently.
            np.testing.assert_allclose(found, run_model(model, feeds, [name])[name], rtol=1e-6, atol=1e-6)


def test_a_sequence_is_kept_between_pieces():
    """What a split into a sequence gives is read on either side of a position."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[n, s, 4] x) => (float[n, s, 2] y)
    <float[4, 4] w = {1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 0, 0, 0, 4},
     int64 two = {2}, int64 i = {0}, int64 j = {1}>
    { a = MatMul (x, w)  parts = SplitToSequence <axis = -1> (a, two)  b = SequenceAt (parts, i)
      c = Relu (b)  d = SequenceAt (parts, j)  y = Add (c, d) }
    """
    model = planish.ir.load(onnx.parser.parse_model(text))
    stream = ActivationStream(model, [{"x": feeds["x"]} for feeds in DATA])
    for name in ("c", "y"):
        for found, feeds in zip(values(stream, name), DATA, strict=True):
            b, d = feeds["x"][..., :2] * [1, 2], feeds["x"][..., 2:] * [3, 4]
            c = np.maximum(b, 0)
            np.testing.assert_allclose(found, c if name == "c" else c + d, rtol=1e-6)


def test_what_was_rewritten_on_the_way_is_what_runs():
    model = make_model()
    stream = ActivationStream(model, DATA)
    values(stream, "b")
    (second,) = [linear for linear in linears(model) if linear.name == "two"]
    zeros = ir.val("zeros", shape=[4, 4], dtype=ir.DataType.FLOAT)
    zeros.const_value = ir.tensor(np.zeros((4, 4), np.float32), name="zeros")
    model.graph.register_initializer(zeros)
    replace(second.node, ir.node("MatMul", [second.node.inputs[0], zeros], name="two"))
    for found, feeds in zip(values(stream, "d"), DATA, strict=True):
        np.testing.assert_array_equal(found, feeds["x"])


def test_only_the_boundary_is_kept():
    stream = ActivationStream(make_model(), DATA)
    values(stream, "b")
    assert set(stream._kept[0]) == {"b"}
    values(stream, "e")
    assert set(stream._kept[0]) == {"d", "e"}


def test_what_lies_behind_is_an_error_and_not_computed_again():
    stream = ActivationStream(make_model(), DATA)
    values(stream, "d")
    with pytest.raises(planish.InputError, match="'b' was passed"):
        values(stream, "b")
    with pytest.raises(planish.InputError, match="no tensor 'nothing'"):
        values(stream, "nothing")


def test_padding_is_left_out_of_rows():
    stream = ActivationStream(make_model(), DATA)
    (tap, *_) = stream.advance(["a"])
    whole = tap.array("a").reshape(-1, 4)
    np.testing.assert_array_equal(tap.rows("a"), whole[[0, 1, 3, 4, 5]])


def test_weights_of_a_copy_go_as_it_runs():
    copy = clone(make_model())
    stream = ActivationStream(copy, DATA, releases_weights=True)
    values(stream, "e")
    held = {name for name, value in copy.graph.initializers.items() if value.const_value is not None}
    assert held == {"three"}


def test_a_copy_keeps_weights_that_are_read_again():
    # `shift` follows from the input alone and is computed again at every piece, so its weight must stay.
    proto = onnx.parser.parse_model(TEXT.replace("Neg (x)", "Mul (x, shifts)"))
    for name, shape in {"shifts": (4,), "one": (4, 4), "two": (4, 4), "three": (4, 4)}.items():
        array = RNG.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = planish.ir.load(proto)
    stream = ActivationStream(clone(model), DATA, releases_weights=True)
    values(stream, "shift")
    for found, feeds in zip(values(stream, "e"), DATA, strict=True):
        np.testing.assert_allclose(found, run_model(model, feeds, ["e"])["e"], rtol=1e-6, atol=1e-6)


def test_no_data_is_an_error():
    with pytest.raises(planish.InputError, match="no calibration data"):
        ActivationStream(make_model(), [])


def test_covariance_is_the_mean_of_outer_products():
    rows, others = RNG.standard_normal((2, 5000, 3)).astype(np.float32)
    covariance, cross = Covariance(3), Covariance(3)
    for part in np.array_split(np.arange(5000), 7):
        covariance.update(rows[part])
        cross.update(rows[part], others[part])
    exact = rows.astype(np.float64)
    # Products of up to 2048 float32 rows: relative rounding of 2048 · 2⁻²⁴ at most, of terms of size 1.
    np.testing.assert_allclose(covariance.mean, exact.T @ exact / 5000, atol=2e-4)
    np.testing.assert_allclose(cross.mean, exact.T @ others / 5000, atol=2e-4)
    assert covariance.tokens == 5000


@pytest.mark.slow
def test_float16_decoders_run_in_pieces():
    """onnxruntime has no float16 kernel of Attention: it puts the op's body there, which needs sizes."""
    module = small_decoder().half()
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))
    compiled = planish.compile(
        module,
        "canonicalize,fuse,quantize{scheme=W4A16,group_size=16,algorithm=gptq,ignore=[]}",
        calibration=[{"input_ids": ids}],
        target="portable",
    )
    assert compiled.report.passes[-1].coverage.covered > 8
    assert compiled(torch.as_tensor(ids))["logits"].isfinite().all()


@pytest.mark.slow
def test_caches_of_float16_decoders_are_written_in_place():
    compiled = planish.compile(small_decoder().half(), "canonicalize,fuse,raise-cache")
    assert any(binding.kernel == "GroupQueryAttention" for binding in compiled.bound.bindings)
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (2, 9))
    plain = planish.compile(small_decoder().half(), "canonicalize,fuse", target="portable")
    np.testing.assert_array_equal(compiled.generate(ids, 6), plain.generate(ids, 6))
