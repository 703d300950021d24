"""R1: one rotation of the residual stream, exact in float64, undone by its inverse."""

import numpy as np
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest
import scipy.linalg
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import get_target
from planish.ir import format_model, infer_shapes
from planish.passes.infrastructure.base import PassContext, PassResult
from planish.passes.rotate import Rotate
from planish.passes.rotate.residual import residual_rotations

Arrays = dict[str, np.ndarray]
# Float64 sums of a few dozen products: a hundred times the rounding of one.
EXACT = 1e-13
WIDTH, INNER, VOCABULARY = 8, 10, 11
IDS = {"ids": np.array([[3, 1, 4, 1], [5, 9, 2, 6]])}
RMS = "RMSNormalization <axis = -1, epsilon = 1e-3>"


def weights_of(width: int = WIDTH, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {
        "embed.weight": (VOCABULARY, width),
        "positions": (1, 4, width),
        "up.weight": (width, INNER),
        "down.weight": (INNER, width),
        "down.bias": (width,),
        "head.weight": (width, VOCABULARY),
    }
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return arrays | {"norm.weight": np.ones(width), "final.weight": np.ones(width)}


def model_of(body: str, weights: Arrays, *, ids: str = "int64[b,s] ids", outputs: str = "") -> ir.Model:
    """A model with logits; in ``body``, the dots of weights' names are written ``__``."""
    text = (
        f'<ir_version: 11, opset_import: ["" : 23]> g ({ids}) => (double[b,s,v] logits{outputs}) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    for name, array in weights.items():
        if name.replace(".", "__") in body:
            tensor = ir.to_proto(ir.tensor(array, name=name.replace(".", "__")))
            proto.graph.initializer.append(tensor)
    model = ir.from_proto(proto)
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("__", ".")
    infer_shapes(model)
    return model


DECODER = f"""
    half = Constant <value = double {{0.5}}> ()
    e = Gather (embed__weight, ids)
    h = Mul (e, half)
    x = Add (h, positions)
    n = {RMS} (x, norm__weight)
    u = MatMul (n, up__weight)
    a = Relu (u)
    d_product = MatMul (a, down__weight)
    d = Add (d_product, down__bias)
    y = Add (x, d)
    f = {RMS} (y, final__weight)
    logits = MatMul (f, head__weight)
"""


def run(model: ir.Model) -> np.ndarray:
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, IDS)[0]


def rotate(model: ir.Model, seed: int = 0, **options: object) -> tuple[PassResult, PassContext]:
    context = PassContext(target=get_target("portable"), seed=seed)
    return Rotate(rotations=("R1",), **options).run(model, context), context


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def test_every_writer_and_reader_turns():
    weights = weights_of()
    model = model_of(DECODER, weights)
    before = run(model)
    result, _ = rotate(model)
    assert str(result.coverage) == "1 of 1 rotations"
    q = scipy.linalg.hadamard(WIDTH) / np.sqrt(WIDTH)
    expected = {
        "embed.weight": weights["embed.weight"] @ q,
        "positions": weights["positions"] @ q,
        "up.weight": q.T @ weights["up.weight"],
        "down.weight": weights["down.weight"] @ q,
        "down.bias": weights["down.bias"] @ q,
        "head.weight": q.T @ weights["head.weight"],
        "norm.weight": weights["norm.weight"],
        "final.weight": weights["final.weight"],
    }
    for name, array in expected.items():
        np.testing.assert_allclose(weight(model, name), array, rtol=0, atol=EXACT, err_msg=name)
    np.testing.assert_allclose(run(model), before, rtol=0, atol=EXACT * np.abs(before).max())


def test_a_rotation_and_its_inverse_give_back_the_weights():
    weights = weights_of()
    model = model_of(DECODER, weights)
    q = scipy.stats.ortho_group.rvs(WIDTH, random_state=0)
    for matrix in (q, q.T):
        ((change,), skipped) = residual_rotations(
            model, lambda features, label, matrix=matrix: (lambda vectors: vectors @ matrix, ())
        )
        assert not skipped
        change.make(model)
        if matrix is q:
            assert np.abs(weight(model, "embed.weight") - weights["embed.weight"]).max() > 0.1
    for name, array in weights.items():
        np.testing.assert_allclose(weight(model, name), array, rtol=0, atol=EXACT, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(
    width=st.sampled_from([2, 6, 8, 12, 20]),
    kind=st.sampled_from(["hadamard", "random-hadamard", "random-matrix"]),
    seed=st.integers(0, 99),
)
def test_exact_for_every_kind_and_width(width, kind, seed):
    model = model_of(DECODER, weights_of(width, seed))
    before = run(model)
    rotate(model, seed, kind=kind)
    np.testing.assert_allclose(run(model), before, rtol=0, atol=EXACT * np.abs(before).max())


def test_an_odd_width_takes_a_random_matrix_and_says_so():
    model = model_of(DECODER, weights_of(7))
    before = run(model)
    _, context = rotate(model)
    assert any("7 channels have no Hadamard matrix" in remark.text for remark in context.remarks)
    np.testing.assert_allclose(run(model), before, rtol=0, atol=EXACT * np.abs(before).max())


def test_a_width_without_a_hadamard_matrix_turns_in_blocks_and_says_so():
    model = model_of(DECODER, weights_of(6))
    _, context = rotate(model)
    assert any("blocks of 2" in remark.text for remark in context.remarks)


def test_a_projection_that_is_tied_is_untied():
    body = DECODER.replace(
        "logits = MatMul (f, head__weight)",
        "t = Transpose <perm = [1, 0]> (embed__weight) logits = MatMul (f, t)",
    )
    model = model_of(body, weights_of())
    model.graph[-1].metadata_props["planish.tied_to"] = "embed.weight"
    before = run(model)
    result, _ = rotate(model)
    assert result.statistics["weights-untied"] == 1
    np.testing.assert_allclose(run(model), before, rtol=0, atol=EXACT * np.abs(before).max())


def test_a_linear_that_reads_and_writes_the_stream_turns_on_both_sides():
    weights = weights_of() | {"mix.weight": np.random.default_rng(1).standard_normal((WIDTH, WIDTH))}
    body = DECODER.replace("y = Add (x, d)", "z = Add (x, d) w = MatMul (z, mix__weight) y = Add (z, w)")
    model = model_of(body, weights)
    before = run(model)
    rotate(model)
    q = scipy.linalg.hadamard(WIDTH) / np.sqrt(WIDTH)
    np.testing.assert_allclose(weight(model, "mix.weight"), q.T @ weights["mix.weight"] @ q, atol=EXACT)
    np.testing.assert_allclose(run(model), before, rtol=0, atol=EXACT * np.abs(before).max())


def test_a_linear_that_is_called_twice_turns_once():
    again = f"n2 = {RMS} (y0, norm__weight) u2 = MatMul (n2, up__weight) a2 = Relu (u2) "
    again += "d2 = MatMul (a2, down__weight) y = Add (y0, d2)"
    model = model_of(DECODER.replace("y = Add (x, d)", f"y0 = Add (x, d) {again}"), weights_of())
    before = run(model)
    result, _ = rotate(model)
    assert str(result.coverage) == "1 of 1 rotations"
    np.testing.assert_allclose(run(model), before, rtol=0, atol=EXACT * np.abs(before).max())


WEIGHTED = weights_of() | {"norm.weight": np.full(WIDTH, 2.0)}
NOT_ROTATED = {
    "a norm has weights": (DECODER, {}, WEIGHTED, "a norm with weights reads the stream: fold-norms"),
    "a norm subtracts the mean": (
        DECODER.replace(f"f = {RMS}", "f = LayerNormalization <axis = -1, epsilon = 1e-3>"),
        {},
        weights_of(),
        "a LayerNorm reads the stream: fold-norms",
    ),
    "a norm writes it, as in Gemma 2": (
        DECODER.replace("y = Add (x, d)", f"b = {RMS} (d, post__weight) y = Add (x, b)"),
        {},
        WEIGHTED | {"norm.weight": np.ones(WIDTH), "post.weight": np.full(WIDTH, 2.0)},
        "a norm that keeps its weights writes the stream (post)",
    ),
    "the graph returns it": (DECODER, {"outputs": ", double[b,s,w] y"}, weights_of(), "the graph returns"),
    "it is an input of the graph": (
        DECODER.replace("e = Gather (embed__weight, ids)", "e = Identity (embeds)"),
        {"ids": "double[b,s,8] embeds"},
        weights_of(),
        "the stream is an input of the graph",
    ),
    "an op mixes its channels": (
        DECODER.replace("y = Add (x, d)", "r = Relu (d) y = Add (x, r)"),
        {},
        weights_of(),
        "Relu writes the stream",
    ),
    "it is scaled channel by channel": (
        DECODER.replace("y = Add (x, d)", "r = Mul (d, down__bias) y = Add (x, r)"),
        {},
        weights_of(),
        "Mul writes the stream",
    ),
    "a number is added to all channels": (
        DECODER.replace("y = Add (x, d)", "r = Add (d, half) y = Add (x, r)"),
        {},
        weights_of(),
        "Add writes the stream",
    ),
    "its table is read elsewhere": (
        DECODER.replace("y = Add (x, d)", "o = Abs (embed__weight) y = Add (x, d)"),
        {},
        weights_of(),
        "embed.weight is shared",
    ),
}


@pytest.mark.parametrize(("body", "signature", "weights", "reason"), NOT_ROTATED.values(), ids=NOT_ROTATED)
def test_not_rotated(body, signature, weights, reason):
    model = model_of(body, weights, **signature)
    before = format_model(model)
    result, context = rotate(model)
    assert not result.modified
    assert result.coverage.covered == 0
    assert any(reason in skip.reason for skip in result.coverage.skipped)
    assert any("not rotated" in remark.text for remark in context.remarks)
    assert format_model(model) == before
    for name in model.graph.initializers:
        if name in weights:
            np.testing.assert_array_equal(weight(model, name), weights[name])
