"""The rotate pass as a whole: its options, its verdict, and what it keeps when rotations must pay."""

import dataclasses
from typing import ClassVar

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.codegen.target import BoundModel, Target
from planish.ir import infer_shapes
from planish.ir.errors import InputError, NothingCoveredError, PipelineError
from planish.passes.infrastructure.base import Fact, PassContext, PassResult
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.facts import set_facts
from planish.passes.infrastructure.instruments import ContractCheck
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.rotate import Rotate
from planish.passes.rotate.probes import Probe

WIDTH, HEADS, SIZE, INNER, VOCABULARY = 16, 2, 8, 32, 50
RMS = "RMSNormalization <axis = -1, epsilon = 1e-5>"
TURN = "Transpose <perm = [0, 2, 1, 3]>"
BODY = f"""
    x = Gather (embed__weight, ids)
    n = {RMS} (x, norm__weight)
    qp = MatMul (n, q__weight) q4 = Reshape (qp, by_head) q = {TURN} (q4)
    kp = MatMul (n, k__weight) k4 = Reshape (kp, by_head) k = {TURN} (k4)
    vp = MatMul (n, v__weight) v4 = Reshape (vp, by_head) v = {TURN} (v4)
    a, present_key, present_value = Attention (q, k, v, , past_key, past_value)
    at = {TURN} (a) merged = Reshape (at, whole)
    o = MatMul (merged, o__weight) y = Add (x, o)
    m = {RMS} (y, post__weight)
    u = MatMul (m, up__weight) h = Relu (u)
    d = MatMul (h, down__weight) z = Add (y, d)
    f = {RMS} (z, final__weight)
    logits = MatMul (f, head__weight)
"""
SHAPES = {
    "embed.weight": (VOCABULARY, WIDTH),
    **{f"{name}.weight": (WIDTH, WIDTH) for name in "qkvo"},
    "up.weight": (WIDTH, INNER),
    "down.weight": (INNER, WIDTH),
    "head.weight": (WIDTH, VOCABULARY),
}


def model_of(outlier: float = 1.0, seed: int = 0) -> ir.Model:
    """A decoder of one layer, float32; one channel of its stream and one of its MLP are outliers."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape) / np.sqrt(shape[0]) for name, shape in SHAPES.items()}
    weights["embed.weight"] = rng.standard_normal((VOCABULARY, WIDTH))
    weights["embed.weight"][:, 3] *= outlier
    weights["up.weight"][:, 5] *= outlier
    weights |= {f"{name}.weight": np.ones(WIDTH) for name in ("norm", "post", "final")}
    cache = f"float[b,{HEADS},p,{SIZE}]"
    text = (
        f'<ir_version: 11, opset_import: ["" : 23]> g (int64[b,s] ids, {cache} past_key, {cache} past_value) '
        f"=> (float[b,s,{VOCABULARY}] logits, float[b,{HEADS},t,{SIZE}] present_key, "
        f"float[b,{HEADS},t,{SIZE}] present_value) {{ {BODY} }}"
    )
    proto = onnx.parser.parse_model(text)
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    constants |= {"by_head": np.array([0, 0, HEADS, SIZE]), "whole": np.array([0, 0, WIDTH])}
    for name, array in constants.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name.replace(".", "__"))))
    model = ir.from_proto(proto)
    for value in list(model.graph.initializers.values()):
        value.name = value.name.replace("__", ".")
    infer_shapes(model)
    set_facts(model, {Fact.CANONICAL})
    return model


def samples(count: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    empty = np.zeros((2, HEADS, 0, SIZE), np.float32)
    return [
        {"ids": rng.integers(0, VOCABULARY, (2, 12)), "past_key": empty, "past_value": empty}
        for _ in range(count)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stopwatch(Target):
    """Says that linears take a second, and transforms as long as it is told."""

    name: ClassVar[str] = "stopwatch"
    transform: float

    def bind(self, model: ir.Model) -> BoundModel:
        return BoundModel(model=model)

    def seconds(self, node: ir.Node) -> float | None:
        return self.transform if node.op_type == "HadamardTransform" else 1.0


def rotate(model: ir.Model, *, transform: float = 0.1, calibrated: bool = True, **options: object):
    context = PassContext(target=Stopwatch(transform=transform), calibration=samples() if calibrated else ())
    return Rotate(**options).run(model, context), context


def remarks(context: PassContext, subject: str) -> list[str]:
    return [remark.text for remark in context.remarks if remark.subject == subject]


def text_of(result: PassResult) -> str:
    return str(result.coverage)


def test_all_rotations_together_keep_their_contract():
    model = model_of(outlier=20)
    report = run_pipeline(
        model,
        Pipeline.of("rotate"),
        target=get_target("portable"),
        examples=samples(1),
        instruments=[ContractCheck(samples(1))],
    )
    assert str(report.passes[0].coverage) == "4 of 4 rotations"
    # Float32 logits of order 1, from sums of at most 32 products.
    assert report.passes[0].errors["logits"].max_relative < 1e-5


def test_the_verdict_says_that_outliers_are_spread():
    result, context = rotate(model_of(outlier=20), rotations=("R1",))
    assert result.statistics["layers-better"] > result.statistics["layers-worse"]
    (text,) = remarks(context, "R1 embed")
    before, after = map(float, text.removeprefix("mean error ").split(" → "))
    # The outlier set the step of every token; now all channels share its length.
    assert after < 0.8 * before
    (text,) = remarks(context, "q")
    assert text.startswith("weight error ")
    assert ", activation error " in text


def test_without_calibration_data_only_weights_are_judged():
    _, context = rotate(model_of(outlier=20), rotations=("R1",), calibrated=False)
    (text,) = remarks(context, "q")
    assert "activation" not in text


def test_a_scheme_without_rounded_activations_judges_weights_only():
    _, context = rotate(model_of(outlier=20), rotations=("R1",), scheme="W4A16")
    assert "activation" not in remarks(context, "q")[0]


def test_the_cost_of_online_transforms_is_reported_over_that_of_their_linears():
    _, context = rotate(model_of(), rotations=("R3", "R4"), transform=0.1)
    # Two transforms beside two projections, and one beside one.
    assert "online transforms take 10.0% of the linears' time" in remarks(context, "R3 k")[0]
    assert "online transforms take 10.0% of the linears' time" in remarks(context, "R4 down")[0]


def test_what_pays_is_kept():
    model = model_of(outlier=20)
    result, _ = rotate(model, rotations=("R1", "R4"), when="pays")
    assert text_of(result) == "2 of 2 rotations"
    assert any(node.op_type == "HadamardTransform" for node in model.graph)


def test_what_costs_too_much_is_left():
    model = model_of(outlier=20)
    down = model.graph.initializers["down.weight"].const_value.numpy().copy()
    result, context = rotate(model, rotations=("R4",), when="pays", transform=0.6, max_cost=0.5)
    assert (
        text_of(result)
        == "0 of 1 rotations; 1 skipped: its transforms take more than 50% of the linears' time"
    )
    assert not result.modified
    assert not result.coverage.required
    assert remarks(context, "R4 down")[-1].startswith("not rotated")
    assert not any(node.op_type == "HadamardTransform" for node in model.graph)
    np.testing.assert_array_equal(model.graph.initializers["down.weight"].const_value.numpy(), down)
    # The transform that was timed left no trace among the readers.
    hidden = next(node for node in model.graph if node.op_type == "Relu").outputs[0]
    assert [node.op_type for node in hidden.consumers()] == ["MatMul"]


def test_what_makes_errors_larger_is_left_and_nothing_of_it_remains():
    model = model_of()
    # One number in each row: rounding keeps it as it is, and any rotation spoils that.
    diagonal = np.eye(WIDTH, dtype=np.float32)
    for name in "qkvo":
        model.graph.initializers[f"{name}.weight"].const_value = ir.tensor(diagonal)
    result, _ = rotate(model, rotations=("R2",), when="pays", calibrated=False)
    assert text_of(result) == "0 of 1 rotations; 1 skipped: the error does not fall"
    for name in "vo":
        array = model.graph.initializers[f"{name}.weight"].const_value.numpy()
        np.testing.assert_array_equal(array, diagonal)


def test_keys_cannot_be_judged_without_calibration_data():
    result, _ = rotate(model_of(), rotations=("R3",), when="pays", calibrated=False)
    assert "no calibration data to tell whether it pays" in text_of(result)
    result, context = rotate(model_of(), rotations=("R3",), when="pays")
    assert result.coverage.total == 1
    assert any("mean error" in text for text in remarks(context, "R3 k"))


def test_probes_measure_the_error_of_rounded_tokens():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 8)).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    probe = Probe(ir.val("x"), ["x"], (lambda vectors: vectors @ turn,), 8, bits=4)
    for part in (rows[:10], rows[10:]):
        probe.record(part)
    for vectors, found in ((rows.astype(float), probe.effect.before), (rows @ turn, probe.effect.after)):
        step = np.abs(vectors).max(axis=1, keepdims=True) / 7
        rounded = np.round(vectors / step) * step
        expected = np.linalg.norm(vectors - rounded) / np.linalg.norm(vectors)
        assert found == pytest.approx(expected, rel=1e-6)  # rows are float32


def test_zeros_have_no_error():
    probe = Probe(ir.val("x"), ["x"], (), 8, bits=4)
    probe.record(np.zeros((3, 8), np.float32))
    assert (probe.effect.before, probe.effect.after) == (0.0, 0.0)


def test_nothing_to_rotate_is_an_error():
    body = "y = Relu (x)"
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 23]> g (float[b,4] x) => (float[b,4] y) {{ {body} }}'
    )
    model = ir.from_proto(proto)
    set_facts(model, {Fact.CANONICAL})
    with pytest.raises(NothingCoveredError, match="no rotations"):
        run_pipeline(model, Pipeline.of("rotate{when=pays}"), target=get_target("portable"))


@pytest.mark.parametrize("rotations", [(), ("R5",), ("R1", "r2")])
def test_unknown_rotations_are_refused(rotations):
    with pytest.raises(PipelineError, match="expected rotations among"):
        Rotate(rotations=rotations)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(PipelineError, match="W99"):
        Rotate(scheme="W99A4")


def test_comes_before_quantisation():
    with pytest.raises(PipelineError, match="quantized"):
        Pipeline.of("quantize,rotate").check_legal({Fact.CANONICAL})


def test_learning_needs_calibration_data():
    with pytest.raises(InputError, match="calibration"):
        rotate(model_of(), kind="learned", calibrated=False)


def test_learned_rotations_are_made_exactly():
    pytest.importorskip("torch")
    model = model_of(outlier=20)
    report = run_pipeline(
        model,
        Pipeline.of("rotate{kind=learned,steps=3,sequences=2,learning_rate=0.5}"),
        target=get_target("portable"),
        examples=samples(1),
        calibration=samples(),
        instruments=[ContractCheck(samples(1))],
    )
    assert str(report.passes[0].coverage) == "4 of 4 rotations"
    assert any(remark.subject == "learned rotations" for remark in report.passes[0].remarks)
