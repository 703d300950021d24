"""Linear layers, weight transposes, names, ownership and ties."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import clone, save
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import PassContext
from planish.runtime.reference import run_model

SCOPES = "pkg.torch.onnx.name_scopes"
RNG = np.random.default_rng(0)

# One float64 product, accumulated in another order: a few units in the last place of sums of order 1.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    """A graph in ONNX text; ``weights`` become initializers (text has no room for real ones)."""
    header = '<ir_version: 10, opset_import: ["" : 23]>\n'
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    for name, array in weights.items():
        free = next((v for n in model.graph for v in n.inputs if v is not None and v.name == name), None)
        assert free is not None, name
        model.graph.inputs.remove(free)
        free.const_value = ir.tensor(array, name=name)
        free.shape, free.type = ir.Shape(array.shape), ir.TensorType(free.const_value.dtype)
        model.graph.register_initializer(free)
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def node(model: ir.Model, output: str) -> ir.Node:
    return next(n for n in model.graph for v in n.outputs if v.name == output)


def in_module(model: ir.Model, **paths: str) -> None:
    """Say which module the node of each output came from, as torch's exporter does."""
    for output, path in paths.items():
        node(model, output).metadata_props[SCOPES] = str(["", path, "linear"])


def canonicalize(model: ir.Model, **options: object) -> dict[str, int]:
    result = Canonicalize(**options).run(model, PassContext(target=get_target("portable")))
    return dict(result.statistics)


def assert_same_outputs(before: ir.Model, after: ir.Model, **feeds: np.ndarray) -> None:
    expected, found = run_model(before, feeds), run_model(after, feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, **CLOSE, err_msg=name)


def weight(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def test_weight_transposes_are_folded_without_a_copy_and_keep_the_name(tmp_path):
    w = weight(5, 8)
    before = model_of(
        """g (double[b,8] x, double[5,8] m_weight) => (double[b,5] y) {
        t = Transpose(m_weight) y = MatMul(x, t) }""",
        m_weight=w,
    )
    after = clone(before)
    assert canonicalize(after) == {"weight-transposes-folded": 1}
    assert ops(after) == ["MatMul"]
    folded = after.graph.initializers["m_weight"]
    assert folded.shape == [8, 5]
    assert np.shares_memory(folded.const_value.numpy(), w)
    assert_same_outputs(before, after, x=weight(3, 8))
    save(after, tmp_path / "m.onnx")
    assert_same_outputs(before, ir.load(tmp_path / "m.onnx"), x=weight(3, 8))


def test_layers_that_share_a_module_share_the_folded_weight():
    """ALBERT calls one layer many times: one initializer before, one after."""
    before = model_of(
        """g (double[b,8] x, double[8,8] w) => (double[b,8] y) {
        t = Transpose(w) h = MatMul(x, t) u = Transpose(w) y = MatMul(h, u) }""",
        w=weight(8, 8),
    )
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["MatMul", "MatMul"]
    assert list(after.graph.initializers) == ["w"]
    assert_same_outputs(before, after, x=weight(3, 8))


TIED = """g (int64[b,s] ids, double[16,8] embed) => (double[b,s,16] y) {
    x = Gather(embed, ids) t = Transpose(embed) y = MatMul(x, t) }"""


def test_a_tied_projection_keeps_its_tie_and_says_so():
    model = model_of(TIED, embed=weight(16, 8))
    assert canonicalize(model) == {}
    assert ops(model) == ["Gather", "Transpose", "MatMul"]
    assert node(model, "y").metadata_props["planish.tied_to"] == "embed"


def test_untie_gives_the_projection_its_own_weight_without_a_copy():
    table = weight(16, 8)
    before = model_of(TIED, embed=table)
    in_module(before, y="lm_head")
    after = clone(before)
    statistics = canonicalize(after, untie=True)
    assert statistics["weights-untied"] == 1
    assert ops(after) == ["Gather", "MatMul"]
    own = after.graph.initializers["lm_head.weight"].const_value
    assert np.shares_memory(own.numpy(), table)
    assert_same_outputs(before, after, ids=np.array([[1, 2], [0, 15]]))


def test_a_transposed_weight_that_is_an_output_stays():
    model = model_of("g (double[4,8] w) => (double[8,4] y) { y = Transpose(w) }", w=weight(4, 8))
    assert canonicalize(model) == {}


GEMM = "g (double[m,8] x, double[{w}] w, double[{b}] b) => (double[m,5] y) {{ y = Gemm<{a}>(x, w, b) }}"


@pytest.mark.parametrize(("shape", "attributes"), [((8, 5), "transB = 0"), ((5, 8), "transB = 1")])
def test_gemm_of_a_weight_becomes_matmul_and_add(shape, attributes):
    text = GEMM.format(w=str(list(shape))[1:-1], b=5, a=attributes)
    before = model_of(text, w=weight(*shape), b=weight(5))
    after = clone(before)
    assert canonicalize(after)["gemm-to-matmul"] == 1
    assert ops(after) == ["MatMul", "Add"]
    assert after.graph.initializers["w"].shape == [8, 5]
    assert node(after, "y").inputs[1].name == "b"
    assert_same_outputs(before, after, x=weight(3, 8))


def test_gemm_without_bias_becomes_matmul():
    before = model_of(
        "g (double[m,8] x, double[8,5] w) => (double[m,5] y) { y = Gemm(x, w) }", w=weight(8, 5)
    )
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["MatMul"]
    assert_same_outputs(before, after, x=weight(3, 8))


KEPT_GEMMS = {
    "scaled": ((8, 5), (5,), "alpha = 0.5"),
    "scaled bias": ((8, 5), (5,), "beta = 0.5"),
    "bias of one element": ((8, 5), (1,), "transB = 0"),
    "bias with a row for each input": ((8, 5), (3, 5), "transB = 0"),
}


@pytest.mark.parametrize(("shape", "bias", "attributes"), KEPT_GEMMS.values(), ids=KEPT_GEMMS)
def test_general_matrix_products_stay_gemm(shape, bias, attributes):
    text = GEMM.format(w=str(list(shape))[1:-1], b=str(list(bias))[1:-1], a=attributes)
    before = model_of(text, w=weight(*shape), b=weight(*bias))
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Gemm"]
    assert_same_outputs(before, after, x=weight(3, 8))


def test_gemm_with_a_transposed_input_stays():
    model = model_of("g (double[8,m] x, double[8,5] w) => (y) { y = Gemm<transA = 1>(x, w) }", w=weight(8, 5))
    canonicalize(model)
    assert ops(model) == ["Gemm"]


def test_gemm_of_two_activations_stays():
    model = model_of("g (double[m,8] x, double[8,5] w) => (double[m,5] y) { y = Gemm(x, w) }")
    canonicalize(model)
    assert ops(model) == ["Gemm"]


def test_gemm_whose_weight_is_also_read_untransposed_keeps_its_orientation():
    before = model_of(
        "g (double[m,8] x, double[8,8] w) => (y) { h = Gemm<transB = 1>(x, w) y = MatMul(h, w) }",
        w=weight(8, 8),
    )
    after = clone(before)
    canonicalize(after)
    assert ops(after) == ["Gemm", "MatMul"]
    assert_same_outputs(before, after, x=weight(3, 8))


def test_the_bias_comes_second():
    before = model_of(
        "g (double[b,8] x, double[8,5] w, double[5] c) => (double[b,5] y) { m = MatMul(x, w) y = Add(c, m) }",
        w=weight(8, 5),
        c=weight(5),
    )
    after = clone(before)
    canonicalize(after)
    assert [value.name for value in node(after, "y").inputs] == ["m", "c"]
    assert_same_outputs(before, after, x=weight(3, 8))


CONV1D = """g (double[b,s,8] x, double[8,5] w, double[5] c) => ({outputs})
    <int64[2] flat = {{-1, 8}}, int64[1] five = {{5}}> {{
    h = Shape<start = 0, end = 1>(x) t = Shape<start = 1, end = 2>(x) s = Concat<axis = 0>({restored}, five)
    f = Reshape(x, flat) g = Gemm(f, w, c) {between} r = Reshape(g, s) y = Neg(r) }}"""


def test_a_linear_between_flattening_reshapes_loses_them():
    """How GPT-2's Conv1D is exported."""
    before = model_of(CONV1D.format(outputs="y", restored="h, t", between=""), w=weight(8, 5), c=weight(5))
    after = clone(before)
    assert canonicalize(after)["linear-without-reshapes"] == 1
    assert ops(after) == ["MatMul", "Add", "Neg"]
    assert_same_outputs(before, after, x=weight(2, 3, 8))


@pytest.mark.parametrize(
    ("outputs", "restored", "between"), [("y", "t, h", ""), ("y, k", "h, t", "k = Abs(g)")]
)
def test_reshapes_that_do_more_than_flatten_stay(outputs, restored, between):
    text = CONV1D.format(outputs=outputs, restored=restored, between=between)
    before = model_of(text, w=weight(8, 5), c=weight(5))
    after = clone(before)
    canonicalize(after)
    assert ops(after).count("Reshape") == 2
    assert_same_outputs(before, after, x=weight(2, 3, 8))


LINEAR = "g (double[b,8] x, double[8,5] w, double[5] c) => (double[b,5] y) { m = MatMul(x, w) y = Add(m, c) }"


def named(model: ir.Model, old: str, new: str) -> ir.Model:
    model.graph.initializers[old].name = new
    return model


@pytest.mark.parametrize("anonymous", ["val_84", "onnx::MatMul_123", "mul_7"])
def test_anonymous_weights_are_named_after_their_module(anonymous):
    model = named(model_of(LINEAR, w=weight(8, 5), c=weight(5)), "w", anonymous)
    in_module(model, m="layers.0.up_proj", y="layers.0.up_proj")
    assert canonicalize(model)["weights-named"] == 2
    assert list(model.graph.initializers) == ["layers.0.up_proj.weight", "layers.0.up_proj.bias"]


def test_the_module_is_read_off_torchscript_node_names_and_namespaces():
    model = model_of(LINEAR, w=weight(8, 5), c=weight(5))
    node(model, "m").name = "/model/layers.0/up_proj/MatMul"
    node(model, "y").metadata_props["namespace"] = (
        ": Net/model: Model/model.layers.0.up_proj: Linear/add: aten.add"
    )
    canonicalize(model)
    names = list(model.graph.initializers)
    assert names == ["model.layers.0.up_proj.weight", "model.layers.0.up_proj.bias"]


@pytest.mark.parametrize("given", ["encoder.dense.weight", "weight"])
def test_given_names_and_names_without_evidence_stay(given):
    model = named(model_of(LINEAR, w=weight(8, 5), c=weight(5)), "w", given)
    in_module(model, m="elsewhere")
    canonicalize(model)
    assert set(model.graph.initializers) == {given, "c"}


def test_a_name_that_is_taken_gets_a_number():
    model = model_of(
        """g (double[b,8] x, double[8,8] w, double[8,8] v) => (double[b,8] y) {
        h = MatMul(x, w) y = MatMul(h, v) }""",
        w=weight(8, 8),
        v=weight(8, 8),
    )
    in_module(model, h="attn", y="attn")
    canonicalize(model)
    assert list(model.graph.initializers) == ["attn.weight", "attn.weight_1"]


NORMS = """g (float[b,8] x, float[8] shared) => (float[b,8] y) {
    h = RMSNormalization(x, shared) k = Neg(h) i = RMSNormalization(k, shared)
    y = RMSNormalization(i, shared) }"""


def test_merged_norm_weights_are_separated_without_a_copy(tmp_path):
    ones = np.ones(8, np.float32)
    before = model_of(NORMS, shared=ones)
    named(before, "shared", "norm1.weight")
    in_module(before, h="norm1", i="norm2", y="norm3")
    after = clone(before)
    assert canonicalize(after)["weights-separated"] == 2
    assert [node(after, name).inputs[1].name for name in "hiy"] == [
        "norm1.weight",
        "norm2.weight",
        "norm3.weight",
    ]
    assert np.shares_memory(after.graph.initializers["norm3.weight"].const_value.numpy(), ones)
    x = np.ones((2, 8), np.float32)
    assert_same_outputs(before, after, x=x)
    save(after, tmp_path / "m.onnx")
    assert_same_outputs(before, ir.load(tmp_path / "m.onnx"), x=x)


def test_merged_weights_without_module_evidence_are_separated_by_node():
    model = model_of(NORMS, shared=np.ones(8, np.float32))
    assert canonicalize(model)["weights-separated"] == 2
    assert list(model.graph.initializers) == ["shared", "shared_1", "shared_2"]


def test_one_module_called_several_times_keeps_one_weight():
    model = model_of(NORMS, shared=np.ones(8, np.float32))
    in_module(model, h="norm", i="norm", y="norm")
    assert "weights-separated" not in canonicalize(model)
    assert list(model.graph.initializers) == ["norm.weight"]


def test_one_module_called_several_times_is_no_tie():
    model = model_of(NORMS, shared=np.arange(8, dtype=np.float32))
    in_module(model, h="norm", i="norm", y="norm")
    canonicalize(model)
    assert not model.graph.initializers["norm.weight"].metadata_props


def test_weights_with_varied_contents_are_a_tie_and_say_so():
    model = model_of(NORMS, shared=np.arange(8, dtype=np.float32))
    in_module(model, h="norm1", i="norm2", y="norm2")
    canonicalize(model)
    tied = model.graph.initializers["norm1.weight"]
    assert len(model.graph.initializers) == 1
    assert tied.metadata_props["planish.tied"] == "norm1, norm2"
