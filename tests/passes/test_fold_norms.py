"""Norms lose their weights to the linears behind them, and LayerNorms become RMSNorms."""

import ml_dtypes
import numpy as np
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import format_model, infer_shapes
from planish.ir.errors import PassError, PipelineError
from planish.passes.infrastructure.base import PassContext, PassResult
from planish.passes.infrastructure.facts import Fact
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.rotate import FoldNorms

Arrays = dict[str, np.ndarray]
# Float64 sums of a few dozen products: a hundred times the rounding of one.
EXACT = 1e-13

rng = np.random.default_rng(0)
WIDTH, INNER, VOCABULARY = 6, 10, 11
WEIGHTS = {
    "embed.weight": rng.standard_normal((VOCABULARY, WIDTH)),
    "positions.weight": rng.standard_normal((9, WIDTH)),
    "norm.weight": rng.standard_normal(WIDTH),
    "norm.bias": rng.standard_normal(WIDTH),
    "final.weight": rng.standard_normal(WIDTH),
    "final.bias": rng.standard_normal(WIDTH),
    "up.weight": rng.standard_normal((WIDTH, INNER)),
    "gate.weight": rng.standard_normal((WIDTH, INNER)),
    "up.bias": rng.standard_normal(INNER),
    "down.weight": rng.standard_normal((INNER, WIDTH)),
    "down.bias": rng.standard_normal(WIDTH),
    "head.weight": rng.standard_normal((WIDTH, VOCABULARY)),
}
IDS = {"ids": np.array([[3, 1, 4, 1], [5, 9, 2, 6]])}
RMS = "RMSNormalization <axis = -1, epsilon = 1e-3>"
LAYER = "LayerNormalization <axis = -1, epsilon = 1e-3>"


def model_of(body: str, weights: Arrays = WEIGHTS, outputs: str = "double[b,s,v] logits") -> ir.Model:
    """A model from ids [b, s]; in ``body``, the dots of weights' names are written ``__``."""
    text = f'<ir_version: 11, opset_import: ["" : 23]> g (int64[b,s] ids) => ({outputs}) {{ {body} }}'
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


def run(model: ir.Model) -> list[np.ndarray]:
    return onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, IDS)


def fold(model: ir.Model, **options: object) -> tuple[PassResult, PassContext]:
    context = PassContext(target=get_target("portable"))
    return FoldNorms(**options).run(model, context), context


def weight(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_same_function(model: ir.Model, before: list[np.ndarray]) -> None:
    for new, old in zip(run(model), before, strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=EXACT * np.abs(old).max())


def decoder(norm: str) -> str:
    """A residual MLP between an embedding with learned positions and an output projection."""
    biases = (
        {"norm": ", norm__bias", "final": ", final__bias"} if norm == LAYER else {"norm": "", "final": ""}
    )
    return f"""
        places = Constant <value_ints = [0, 1, 2, 3]> ()
        e = Gather (embed__weight, ids)
        p = Gather (positions__weight, places)
        x = Add (e, p)
        n = {norm} (x, norm__weight{biases["norm"]})
        g = MatMul (n, gate__weight)
        u_product = MatMul (n, up__weight)
        u = Add (u_product, up__bias)
        m = Mul (g, u)
        d_product = MatMul (m, down__weight)
        d = Add (d_product, down__bias)
        y = Add (x, d)
        f = {norm} (y, final__weight{biases["final"]})
        logits = MatMul (f, head__weight)
    """


def test_rms_norm_scales_the_rows_of_its_readers():
    model = model_of(decoder(RMS))
    before = run(model)
    result, _ = fold(model)
    assert str(result.coverage) == "2 of 2 norms"
    gamma = WEIGHTS["norm.weight"][:, None]
    np.testing.assert_array_equal(weight(model, "up.weight"), WEIGHTS["up.weight"] * gamma)
    np.testing.assert_array_equal(weight(model, "gate.weight"), WEIGHTS["gate.weight"] * gamma)
    np.testing.assert_array_equal(weight(model, "up.bias"), WEIGHTS["up.bias"])
    np.testing.assert_array_equal(weight(model, "norm.weight"), np.ones(WIDTH))
    assert ops(model) == ops(model_of(decoder(RMS)))
    assert_same_function(model, before)


def test_layer_norm_moves_its_bias_into_the_bias_of_its_readers():
    model = model_of(decoder(LAYER))
    before = run(model)
    result, _ = fold(model, center=False)
    assert result.statistics == {"norms-folded": 2}
    shift = WEIGHTS["norm.bias"] @ WEIGHTS["up.weight"]
    np.testing.assert_allclose(weight(model, "up.bias"), WEIGHTS["up.bias"] + shift, rtol=EXACT)
    shift = WEIGHTS["norm.bias"] @ WEIGHTS["gate.weight"]
    np.testing.assert_allclose(weight(model, "gate.bias"), shift, rtol=EXACT)
    assert "norm.bias" not in model.graph.initializers
    assert ops(model).count("LayerNormalization") == 2
    assert_same_function(model, before)


def test_a_linear_that_the_graph_returns_keeps_its_name_when_it_gets_a_bias():
    model = model_of(decoder(LAYER))
    fold(model)
    (logits,) = model.graph.outputs
    assert logits.name == "logits"
    assert logits.producer().op_type == "Add"
    np.testing.assert_allclose(
        weight(model, "head.bias"), WEIGHTS["final.bias"] @ WEIGHTS["head.weight"], rtol=EXACT
    )


def test_nodes_that_are_added_have_names_of_their_own():
    """Those of the graph have none; onnxruntime refuses two nodes of the same name."""
    model = model_of(decoder(LAYER))
    fold(model)
    names = [node.name for node in model.graph if node.name]
    assert len(names) == len(set(names)) == 2  # the biases of gate and head


def test_centring_makes_the_writers_mean_free_and_layer_norms_rms_norms():
    model = model_of(decoder(LAYER))
    before = run(model)
    result, _ = fold(model)
    assert result.statistics == {"norms-folded": 2, "streams-centred": 1, "layer-norms-made-rms": 2}
    for name in ("embed.weight", "positions.weight", "down.weight", "down.bias"):
        expected = WEIGHTS[name] - WEIGHTS[name].mean(axis=-1, keepdims=True)
        np.testing.assert_allclose(weight(model, name), expected, rtol=EXACT, atol=EXACT)
    assert ops(model).count("RMSNormalization") == 2
    assert "LayerNormalization" not in ops(model)
    assert_same_function(model, before)


def test_gemm_with_a_transposed_weight():
    weights = WEIGHTS | {"head.weight": WEIGHTS["head.weight"].T.copy()}
    body = f"""
        flat = Constant <value_ints = [-1]> ()
        row = Reshape (ids, flat)
        e = Gather (embed__weight, row)
        n = {LAYER} (e, norm__weight, norm__bias)
        logits = Gemm <transB = 1> (n, head__weight)
    """
    model = model_of(body, weights, outputs="double[t,v] logits")
    before = run(model)
    fold(model)
    np.testing.assert_array_equal(
        weight(model, "head.weight"), weights["head.weight"] * WEIGHTS["norm.weight"]
    )
    assert ops(model)[-2:] == ["RMSNormalization", "Gemm"]
    assert_same_function(model, before)


def test_a_norm_behind_reshapes_and_scaling_is_folded():
    body = f"""
        e = Gather (embed__weight, ids)
        n = {RMS} (e, norm__weight)
        shape = Constant <value_ints = [1, -1, {WIDTH}]> ()
        half = Constant <value = double {{0.5}}> ()
        r = Reshape (n, shape)
        h = Mul (half, r)
        logits = MatMul (h, head__weight)
    """
    model = model_of(body)
    before = run(model)
    result, _ = fold(model)
    assert result.statistics == {"norms-folded": 1}
    assert_same_function(model, before)


def test_a_tied_projection_is_untied_with_a_remark():
    body = f"""
        e = Gather (embed__weight, ids)
        n = {RMS} (e, norm__weight)
        t = Transpose <perm = [1, 0]> (embed__weight)
        logits = MatMul (n, t)
    """
    model = model_of(body)
    model.graph[-1].metadata_props["planish.tied_to"] = "embed.weight"
    before = run(model)
    result, context = fold(model)
    assert result.statistics == {"weights-untied": 1, "norms-folded": 1}
    assert "untied from embed.weight" in context.remarks[0].text
    np.testing.assert_array_equal(weight(model, "embed.weight"), WEIGHTS["embed.weight"])
    assert_same_function(model, before)


def test_a_shared_scale_is_left_to_its_other_reader():
    body = f"""
        e = Gather (embed__weight, ids)
        n = {RMS} (e, norm__weight)
        u = MatMul (n, up__weight)
        d = MatMul (u, down__weight)
        m = {RMS} (d, norm__weight)
        r = Relu (m)
        logits = MatMul (r, head__weight)
    """
    model = model_of(body)
    before = run(model)
    result, _ = fold(model)
    assert str(result.coverage) == "1 of 2 norms; 1 skipped: Relu reads its output"
    np.testing.assert_array_equal(weight(model, "norm.weight"), WEIGHTS["norm.weight"])
    assert_same_function(model, before)


NOT_FOLDED = {
    "another op reads it": ("r = Relu (n) logits = MatMul (r, head__weight)", "Relu reads its output"),
    "it is on a branch, as in Gemma 2": (
        "y = Add (e, n) logits = MatMul (y, head__weight)",
        "Add reads its output",
    ),
    "the weight is shared": (
        "a = MatMul (n, head__weight) b = MatMul (e, head__weight) logits = Add (a, b)",
        "head.weight is shared with another part of the model",
    ),
}


@pytest.mark.parametrize(("tail", "reason"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_not_folded(tail, reason):
    model = model_of(f"e = Gather (embed__weight, ids) n = {RMS} (e, norm__weight) {tail}")
    before = format_model(model)
    result, context = fold(model)
    assert not result.modified
    assert str(result.coverage) == f"0 of 1 norms; 1 skipped: {reason}"
    assert [(each.subject, each.text) for each in context.remarks] == [("norm", f"not folded: {reason}")]
    assert format_model(model) == before
    np.testing.assert_array_equal(weight(model, "norm.weight"), WEIGHTS["norm.weight"])


def test_not_folded_if_the_graph_returns_it_or_its_scale_is_computed():
    returned = model_of(
        f"e = Gather (embed__weight, ids) n = {RMS} (e, norm__weight) logits = MatMul (n, head__weight)",
        outputs="double[b,s,v] logits, double[b,s,6] n",
    )
    assert "the graph returns its output" in str(fold(returned)[0].coverage)
    computed = model_of(
        f"e = Gather (embed__weight, ids) s = Abs (norm__weight) n = {RMS} (e, s) "
        "logits = MatMul (n, head__weight)"
    )
    assert "its scale or bias is computed" in str(fold(computed)[0].coverage)


def test_a_bias_is_not_folded_through_scaling():
    body = f"""
        e = Gather (embed__weight, ids)
        n = {LAYER} (e, norm__weight, norm__bias)
        half = Constant <value = double {{0.5}}> ()
        h = Mul (n, half)
        logits = MatMul (h, head__weight)
    """
    model = model_of(body)
    result, _ = fold(model)
    assert str(result.coverage) == "0 of 1 norms; 1 skipped: Mul reads its output"


NOT_CENTRED = {
    "a linear reads the stream itself": (
        "a = MatMul (n, up__weight) b = MatMul (e, gate__weight) logits = Add (a, b)",
        "gate.weight reads the stream without a norm",
    ),
    "an RMSNorm reads it too": (
        f"a = MatMul (n, up__weight) r = {RMS} (e, final__weight) b = MatMul (r, gate__weight) "
        "logits = Add (a, b)",
        "the RMSNorm final reads the stream too",
    ),
    "something unknown reads it": (
        "a = MatMul (n, up__weight) t = Tanh (e) b = MatMul (t, gate__weight) logits = Add (a, b)",
        "Tanh reads the stream",
    ),
    "its bias could not be folded": ("r = Relu (n) logits = MatMul (r, head__weight)", "its bias could not"),
}


@pytest.mark.parametrize(("tail", "reason"), NOT_CENTRED.values(), ids=NOT_CENTRED)
def test_not_centred(tail, reason):
    body = f"e = Gather (embed__weight, ids) n = {LAYER} (e, norm__weight, norm__bias) {tail}"
    model = model_of(body)
    before = run(model)
    result, context = fold(model)
    assert "streams-centred" not in result.statistics
    assert any(
        remark.text.startswith("stays a LayerNorm") and reason in remark.text for remark in context.remarks
    )
    np.testing.assert_array_equal(weight(model, "embed.weight"), WEIGHTS["embed.weight"])
    assert "LayerNormalization" in ops(model)
    assert_same_function(model, before)


def test_weightless_norms_are_covered_and_nothing_changes():
    model = model_of(decoder(RMS))
    fold(model)
    result, _ = fold(model)
    assert not result.modified
    assert str(result.coverage) == "2 of 2 norms"


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__
)
def test_weights_are_rounded_once_from_float64(dtype):
    narrow = {name: array.astype(dtype) for name, array in WEIGHTS.items()}
    model = model_of(decoder(RMS), narrow)
    fold(model)
    wide = narrow["up.weight"].astype(np.float64) * narrow["norm.weight"].astype(np.float64)[:, None]
    assert weight(model, "up.weight").dtype == dtype
    np.testing.assert_array_equal(weight(model, "up.weight"), wide.astype(dtype))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_weight_is_named(bad):
    broken = WEIGHTS["gate.weight"].copy()
    broken[2, 3] = bad
    with pytest.raises(PassError, match=r"gate\.weight"):
        fold(model_of(decoder(RMS), WEIGHTS | {"gate.weight": broken}))


def test_comes_before_quantisation():
    with pytest.raises(PipelineError, match="quantized"):
        Pipeline.of("quantize,fold-norms").check_legal({Fact.CANONICAL})
