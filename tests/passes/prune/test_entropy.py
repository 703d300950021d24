"""Entropies of known distributions, gains of blocks where they are known, and tokens that repeat."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from planish.ir.errors import InputError
from planish.passes.prune.entropy import Cloud, differential_entropy, entropy_gains
from planish.passes.prune.entropy import entropy_gain as gain_of_clouds
from planish.runtime.calibration import ActivationStream

K = 25


def generator(seed=0):
    return np.random.default_rng(seed)


def entropy_gain(before, after, neighbours):
    return gain_of_clouds(Cloud(before, neighbours), Cloud(after, neighbours))


@pytest.mark.parametrize("features", [1, 2, 4])
def test_gaussian_entropy(features):
    """½ log det(2πe Σ). The estimate's deviation is √(features/2N + ψ'(k)/N) ≤ 0.023; four of them, and the
    bias towards smooth densities, (k/N)^(2/features) times the curvature, below 0.06 here."""
    mixing = generator(1).standard_normal((features, features)) + 2 * np.eye(features)
    rows = generator(2).standard_normal((4000, features)) @ mixing.T
    covariance = 2 * np.pi * np.e * mixing @ mixing.T
    expected = 0.5 * np.linalg.slogdet(covariance)[1]
    assert differential_entropy(rows, K) == pytest.approx(expected, abs=0.15)


def test_uniform_entropy():
    """log of the volume; what lies beyond the edges is empty, which raises the estimate by about √(k/N)/2."""
    rows = generator(3).uniform(0, 3, (6000, 2))
    assert differential_entropy(rows, 5) == pytest.approx(2 * math.log(3), abs=0.06)


def test_scaling_adds_the_logarithm_of_the_volume():
    rows = generator(4).standard_normal((300, 5))
    grown = differential_entropy(rows * 7.0, K) - differential_entropy(rows, K)
    assert grown == pytest.approx(5 * math.log(7), abs=1e-9)  # float64, logs of 300 distances


def test_distances_do_not_depend_on_the_blocks_they_are_computed_in():
    """The same distances by comparing all pairs directly."""
    rows = generator(5).standard_normal((1100, 3))
    pairs = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    nearest = np.sort(pairs, axis=1)[:, K]  # the first is the row itself
    log_ball = math.log(4 / 3 * math.pi)
    harmonic = sum(1 / i for i in range(K, len(rows)))  # ψ(N) − ψ(k)
    expected = harmonic + log_ball + 3 * np.log(nearest).mean()
    assert differential_entropy(rows, K) == pytest.approx(expected, abs=1e-9)


def test_a_block_that_adds_nothing_gains_nothing():
    rows = generator(6).standard_normal((200, 16))
    assert entropy_gain(rows, rows.copy(), K) == 0.0


def test_growth_shifts_and_constant_features_gain_nothing():
    rows = generator(7).standard_normal((200, 16))
    scale, shift = generator(8).uniform(0.5, 20, (2, 16))
    constant = np.full((200, 1), 0.1)
    gain = entropy_gain(np.hstack([rows, constant]), np.hstack([rows * scale + shift, constant]), K)
    assert gain == pytest.approx(0.0, abs=1e-8)  # float64: 17 features × 1e-15 × the shift over the deviation


def test_noise_gains_and_collapse_loses():
    """Tokens on a plane spread into 8 dimensions, and the other way round."""
    plane = generator(9).standard_normal((400, 2)) @ generator(10).standard_normal((2, 8))
    spread = plane + generator(11).standard_normal((400, 8))
    assert entropy_gain(plane, spread, K) > 1
    assert entropy_gain(spread, plane, K) < -1


def test_gaussian_gain_is_that_of_the_correlations():
    """Standardised, x of independent features has ½ log det R more than one with correlations R."""
    mixing = np.array([[1.0, 0.0], [0.9, math.sqrt(1 - 0.81)]])
    rows = generator(12).standard_normal((4000, 2))
    assert entropy_gain(rows @ mixing.T, rows, K) == pytest.approx(-0.5 * math.log(1 - 0.81), abs=0.1)


def test_copies_do_not_count():
    """100 equal tokens beside 300 others: as if they were not there, though their distances are 0."""
    before = generator(13).standard_normal((300, 4))
    after = before + generator(14).standard_normal((300, 4)) * [0.1, 1, 2, 3]
    copies = np.full((100, 4), 1.5)
    gain = entropy_gain(np.vstack([copies, before]), np.vstack([copies, after]), K)
    assert gain == pytest.approx(entropy_gain(before, after, K), abs=1e-9)


def test_copies_that_differ_by_rounding_do_not_count():
    noise = generator(15).standard_normal((100, 4)) * 1e-6
    before = generator(16).standard_normal((300, 4))
    after = before + generator(17).standard_normal((300, 4))
    gain = entropy_gain(np.vstack([1.5 + noise, before]), np.vstack([1.5 + noise, after]), K)
    assert gain == pytest.approx(entropy_gain(before, after, K), abs=1e-9)


def test_telling_copies_apart_gains_infinity():
    words = np.repeat(generator(18).standard_normal((4, 6)), 50, axis=0)
    apart = words + generator(19).standard_normal((200, 6))
    assert entropy_gain(words, apart, K) == math.inf
    assert entropy_gain(apart, words, K) == -math.inf
    assert entropy_gain(words, words * 2, K) == 0.0


def test_too_few_tokens_are_refused():
    rows = generator(20).standard_normal((K, 3))
    with pytest.raises(InputError, match=f"more than {K} tokens, found {K}"):
        entropy_gain(rows, rows, K)


def chain():
    """x, then x + 0·x, then noise-like products: [sequence, 6] each."""
    text = """<ir_version: 11, opset_import: ["" : 23]>
    g (float[batch, sequence, 6] x) => (float[batch, sequence, 6] z) {
        zero = MatMul (x, nothing) y = Add (x, zero) turned = MatMul (y, much) bent = Sin (turned)
        z = Add (y, bent) }"""
    proto = onnx.parser.parse_model(text)
    weights = {"nothing": np.zeros((6, 6)), "much": generator(21).standard_normal((6, 6)) * 9}
    for name, array in weights.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array.astype(np.float32), name=name)))
    return ir.from_proto(proto)


def data(seed, value=None):
    rows = generator(seed).standard_normal((2, 60, 2)) @ generator(22).standard_normal((2, 6))
    rows = rows.astype(np.float32)
    if value is not None:
        rows[0, 0, 0] = value
    return {"x": rows}


def test_gains_along_a_stream():
    feeds = [data(23), data(24)]
    spans = [("x", "y"), ("y", "z"), ("x", "z")]
    gains = list(entropy_gains(ActivationStream(chain(), feeds), spans[:2], tokens=200, neighbours=K))
    assert gains[0] == 0.0
    assert gains[1] > 1
    whole = list(entropy_gains(ActivationStream(chain(), feeds), spans[2:], tokens=200, neighbours=K))
    assert whole == [pytest.approx(gains[1], abs=1e-6)]  # the same values in float32


def test_tokens_are_taken_from_every_batch():
    """A quarter of the tokens, at equal distances, of both batches."""
    feeds = [data(25), data(26)]
    (gain,) = entropy_gains(ActivationStream(chain(), feeds), [("x", "z")], tokens=60, neighbours=5)
    rows = np.concatenate([batch["x"].reshape(-1, 6)[2::4] for batch in feeds])
    weight = (generator(21).standard_normal((6, 6)) * 9).astype(np.float32)
    after = rows + np.sin(rows @ weight)
    assert gain == pytest.approx(entropy_gain(rows, after, 5), abs=1e-3)  # sines of float32 products


def test_the_pixels_of_images_are_tokens():
    """A block that mixes channels only: as if the pixels were rows."""
    text = """<ir_version: 11, opset_import: ["" : 23]>
    g (float[batch, 3, 7, 5] x) => (float[batch, 3, 7, 5] y) { c = Conv (x, w) s = Sin (c) y = Add (x, s) }"""
    proto = onnx.parser.parse_model(text)
    weight = (generator(28).standard_normal((3, 3, 1, 1)) * 3).astype(np.float32)
    proto.graph.initializer.append(ir.to_proto(ir.tensor(weight, name="w")))
    images = generator(29).standard_normal((4, 3, 7, 5)).astype(np.float32)
    stream = ActivationStream(ir.from_proto(proto), [{"x": images}])
    (gain,) = entropy_gains(stream, [("x", "y")], tokens=999, neighbours=K)
    rows = images.transpose(0, 2, 3, 1).reshape(-1, 3)
    after = rows + np.sin(rows @ weight[:, :, 0, 0].T)
    assert gain == pytest.approx(entropy_gain(rows, after, K), abs=1e-4)  # float32 sines


def test_values_that_are_not_finite_are_named():
    with pytest.raises(InputError, match="'y' holds NaN or infinity"):
        list(
            entropy_gains(
                ActivationStream(chain(), [data(27, np.nan)]), [("y", "z")], tokens=99, neighbours=5
            )
        )
