"""Decomposed rotary embeddings: every spelling and precondition, against rotations in the complex plane."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from planish.codegen import get_target
from planish.ir import clone
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import PassContext
from planish.runtime.reference import run_model

SIZE = 8
FREQUENCIES = 10.0 ** -np.arange(SIZE // 2)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 5, SIZE)).astype(np.float32)
POSITIONS = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])

# One rotation in float32 on values of order 1; angles up to 11 rad carry their own rounding.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def model_of(body: str, *, inputs: str = "", constants: str = "", opset: int = 23) -> ir.Model:
    frequencies = ", ".join(str(f) for f in FREQUENCIES)
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[b,h,s,{SIZE}] x, int64[b,s] positions{inputs}) => (y)
        <float[{SIZE // 2}] inv_freq = {{{frequencies}}},
         int64[1] zero = {{0}}, int64[1] quarter = {{{SIZE // 4}}}, int64[1] half = {{{SIZE // 2}}},
         int64[1] three = {{3}}, int64[1] end = {{9223372036854775807}}, int64[1] last = {{-1}},
         int64[1] one = {{1}}, int64[1] two = {{2}}, float scale = {{1.5}}{constants}>
        {{ {body} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def canonicalize(model: ir.Model) -> dict[str, int]:
    return dict(Canonicalize().run(model, PassContext(target=get_target("portable"))).statistics)


def rotated(x: np.ndarray, positions: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Channels i and i + n/2 are one complex number, turned by position · frequency i."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None] * FREQUENCIES[:half]
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles) * scale
    return np.concatenate([turned.real, turned.imag], axis=-1)


ANGLES = """p = Unsqueeze(positions, two) f = Cast<to = 1>(p) angles = Mul(f, inv_freq)
    other = Abs(angles) both = Concat<axis = -1>(angles, angles) """
CACHES = ANGLES + "c3 = Cos(both) s3 = Sin(both) c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) "
HALVES = "x1 = Slice(x, zero, half, three, one) x2 = Slice(x, half, end, last, one) "
TURNED = "m = Neg(x2) r = Concat<axis = -1>(m, x1) "
SUM = "a = Mul(x, c) d = Mul(r, s) y = Add(a, d)"

SPELLINGS = {
    "slices": CACHES + HALVES + TURNED + SUM,
    "split": CACHES + "x1, x2 = Split<axis = -1, num_outputs = 2>(x) " + TURNED + SUM,
    "other order of operands": CACHES + HALVES + TURNED + "a = Mul(c, x) d = Mul(s, r) y = Add(d, a)",
}


@pytest.mark.parametrize("body", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_become_one_node_with_half_caches(body):
    model = model_of(body)
    assert canonicalize(model)["rotary-embedding"] == 1
    assert set(ops(model)) == {"Unsqueeze", "Cast", "Mul", "Cos", "Sin", "RotaryEmbedding"}
    rotary = model.graph[-1]
    assert rotary.inputs[1].shape[-1] == SIZE // 2
    found = run_model(model, {"x": X, "positions": POSITIONS})["y"]
    np.testing.assert_allclose(found, rotated(X, POSITIONS), **CLOSE)


def test_scaled_caches_keep_their_scale():
    """Long-context variants multiply cos and sin by an attention factor."""
    scaled = ANGLES + "c2 = Cos(both) s2 = Sin(both) c3 = Mul(c2, scale) s3 = Mul(scale, s2) "
    model = model_of(scaled + "c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) " + HALVES + TURNED + SUM)
    canonicalize(model)
    assert "RotaryEmbedding" in ops(model)
    found = run_model(model, {"x": X, "positions": POSITIONS})["y"]
    np.testing.assert_allclose(found, rotated(X, POSITIONS, scale=1.5), **CLOSE)


def layer(x: str, y: str) -> str:
    return f"""{y}1 = Slice({x}, zero, half, three, one) {y}2 = Slice({x}, half, end, last, one)
        {y}m = Neg({y}2) {y}r = Concat<axis = -1>({y}m, {y}1)
        {y}a = Mul({x}, c) {y}d = Mul({y}r, s) {y} = Add({y}a, {y}d) """


def test_all_layers_share_one_cosine_and_one_sine():
    model = model_of(CACHES + layer("x", "u") + layer("u", "v") + "y = Neg(v)")
    assert canonicalize(model)["rotary-embedding"] == 2
    assert (ops(model).count("Cos"), ops(model).count("Sin")) == (1, 1)
    found = run_model(model, {"x": X, "positions": POSITIONS})["y"]
    np.testing.assert_allclose(found, -rotated(rotated(X, POSITIONS), POSITIONS), **CLOSE)


def test_angles_of_batch_one_are_expanded_to_the_batch():
    """Positions that the model counts itself have batch 1; runtimes want that of the input."""
    before = model_of(
        (CACHES + HALVES + TURNED + SUM).replace("(positions, two)", "(own, two)"), inputs=", int64[1,s] own"
    )
    after = clone(before)
    canonicalize(after)
    assert "RotaryEmbedding" in ops(after)
    found = run_model(after, {"x": X, "positions": POSITIONS, "own": POSITIONS[1:]})["y"]
    np.testing.assert_allclose(found, rotated(X, POSITIONS[[1, 1]]), **CLOSE)


def table(of: np.ufunc, *, halves_equal: bool = True) -> str:
    angles = np.arange(16)[:, None] * FREQUENCIES
    second = angles if halves_equal else angles + 1
    return ", ".join(str(number) for number in of(np.concatenate([angles, second], -1)).reshape(-1))


@pytest.mark.parametrize("halves_equal", [True, False])
def test_gathered_tables_are_halved_if_their_halves_are_equal(halves_equal):
    constants = "".join(
        f", float[16,{SIZE}] {name} = {{{table(of, halves_equal=halves_equal)}}}"
        for name, of in (("cos_table", np.cos), ("sin_table", np.sin))
    )
    caches = """c3 = Gather(cos_table, positions) s3 = Gather(sin_table, positions)
        c = Unsqueeze(c3, one) s = Unsqueeze(s3, one) """
    before = model_of(caches + HALVES + TURNED + SUM, constants=constants)
    after = clone(before)
    canonicalize(after)
    feeds = {"x": X, "positions": POSITIONS}
    if halves_equal:
        assert ops(after) == ["RotaryEmbedding"]
        assert after.graph[0].inputs[1].shape == [16, SIZE // 2]
        np.testing.assert_allclose(run_model(after, feeds)["y"], rotated(X, POSITIONS), **CLOSE)
    else:
        assert "RotaryEmbedding" not in ops(after)
        np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


KEPT = {
    "halves of different angles": (CACHES + HALVES + TURNED + SUM).replace(
        "(angles, angles)", "(angles, other)"
    ),
    "the other half is negated": CACHES + HALVES + "m = Neg(x1) r = Concat<axis = -1>(x2, m) " + SUM,
    "no negation": CACHES + HALVES + "r = Concat<axis = -1>(x2, x1) " + SUM,
    "unequal parts": CACHES + HALVES.replace("half", "quarter") + TURNED + SUM,
    "another value is turned": CACHES
    + HALVES
    + TURNED
    + "v = Abs(x) a = Mul(v, c) d = Mul(r, s) y = Add(a, d)",
    "a cache per head": (CACHES + HALVES + TURNED + SUM).replace("3, one)", "3, two)"),
    "difference": (CACHES + HALVES + TURNED + SUM).replace("y = Add", "y = Sub"),
}


@pytest.mark.parametrize("body", KEPT.values(), ids=KEPT)
def test_what_is_no_rotation_stays(body):
    before = model_of(body)
    after = clone(before)
    canonicalize(after)
    assert "RotaryEmbedding" not in ops(after)
    # As many heads as positions, so that a cache along either axis fits.
    feeds = {"x": np.repeat(X[:, :1], 5, axis=1), "positions": POSITIONS}
    np.testing.assert_array_equal(run_model(after, feeds)["y"], run_model(before, feeds)["y"])


def test_opset_22_has_no_rotary_embedding():
    model = model_of(SPELLINGS["slices"], opset=22)
    canonicalize(model)
    assert "RotaryEmbedding" not in ops(model)


PARTIAL = """part = Slice(whole, zero, size, last) rest = Slice(whole, {start}, end, last) """


@pytest.mark.parametrize(("start", "merged"), [("size", True), ("one", False)])
def test_partial_rotation_is_an_attribute(start, merged):
    body = PARTIAL.format(start=start) + CACHES + layer("part", "t") + "y = Concat<axis = -1>(t, rest)"
    before = model_of(
        body,
        inputs=f", float[b,h,s,{SIZE + 4}] whole",
        constants=f", int64[1] size = {{{SIZE}}}",
    )
    after = clone(before)
    canonicalize(after)
    assert ("Concat" not in ops(after)) is merged
    whole = np.concatenate([X, X[..., :4] + 1], axis=-1)
    feeds = {"x": X, "positions": POSITIONS, "whole": whole}
    np.testing.assert_allclose(run_model(after, feeds)["y"], run_model(before, feeds)["y"], **CLOSE)
    if merged:
        assert after.graph[-1].attributes["rotary_embedding_dim"].as_int() == SIZE
        expected = np.concatenate([rotated(X, POSITIONS), X[..., :4] + 1], axis=-1)
        np.testing.assert_allclose(run_model(after, feeds)["y"], expected, **CLOSE)
