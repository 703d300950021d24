"""Budgets of eviction: shares by layer and head, masses of attention, and a game of heads."""

import numpy as np
import planish
import pytest
from evictions import TARGET
from planish.ir import clone
from planish.passes import Pipeline
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.kv_cache import Evict, KVCache, RaiseCache
from planish.passes.kv_cache.evict.budgets import (
    SHARES,
    contribution_shares,
    grouped,
    layer_shares,
    mass_curve,
    mass_shares,
    prefix_shares,
)
from planish.passes.kv_cache.evict.contributions import Coalitions, contributions
from planish.runtime.calibration import CalibrationData
from scipy.special import softmax
from small_decoders import KV_HEADS, LAYERS, VOCABULARY

pytestmark = pytest.mark.slow

IDS = np.random.default_rng(5).integers(0, VOCABULARY, (1, 40))


def test_shares():
    for keep in (0.1, 0.5, 0.9):
        assert layer_shares("uniform", keep, 3) == [keep] * 3
        shares = layer_shares("pyramid", keep, 8)
        assert np.mean(shares) == pytest.approx(keep)
        assert shares == sorted(shares, reverse=True)
        assert 0 < shares[-1] < shares[0] <= 1
    assert layer_shares("pyramid", 0.5, 1) == [0.5]


def test_the_mass_of_a_text():
    rng = np.random.default_rng(0)
    queries, keys = rng.standard_normal((2, 3, 6, 8))
    weights = np.zeros(6)
    for head in range(3):
        for row in range(6):
            weights[: row + 1] += softmax(keys[head, : row + 1] @ queries[head, row] * 0.7) / 18
    curve = mass_curve(queries, keys, 0.7)
    assert (curve[0], curve[-1]) == (0, pytest.approx(1))
    for count in range(7):
        expected = np.sort(weights)[::-1][:count].sum()
        assert np.interp(count / 6, SHARES, curve) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
def test_shares_by_mass(keep):
    sharp, even = SHARES**0.1, SHARES
    shares = prefix_shares([sharp, even, sharp], keep)
    assert np.mean(shares) == pytest.approx(keep, abs=1e-6)
    if keep < 1:
        assert shares[0] == shares[2] < shares[1]
        # Each layer keeps the same mass.
        assert np.interp(shares[0], SHARES, sharp) == pytest.approx(
            np.interp(shares[1], SHARES, even), abs=1e-6
        )


def test_groups_of_heads():
    sharp, even = SHARES**0.1, SHARES
    first, second = map(grouped, mass_shares([[even, sharp, even, sharp], [sharp]], 0.4))
    assert first.heads == ((1, 3), (0, 2))
    assert first.shares[0] < first.shares[1]
    assert first.shares[0] >= 0.2 * 0.4
    assert second.heads == ((0,),)
    kept = [
        share
        for group in (first, second)
        for heads, share in zip(group.heads, group.shares, strict=True)
        for _ in heads
    ]
    assert np.mean(kept) == pytest.approx(0.4, abs=1e-6)
    assert mass_shares([[even, sharp]], 1.0) == [[1.0, 1.0]]


def additive(values):
    """A game without cooperation: a coalition has the sum of what its members have."""
    return lambda members: float(np.dot(members, values))


def test_contributions_of_an_additive_game():
    """There C(S) = v(S) − v(N ∖ S), and what others have averages out over coalitions of one size."""
    values = np.array([5.0, 1.0, 0.0, 0.0])
    found = contributions(additive(values), 4, range(3000), np.random.default_rng(0))
    # Over all S of size m with h: v_h + E[rest in S] − E[rest outside]; averaged over m = 1, 2, 3.
    rest = (values.sum() - values) / 3
    exact = values + np.mean([(m - 1) - (4 - m) for m in (1, 2, 3)]) * rest
    # The standard error of 3,000 draws is below 0.05.
    np.testing.assert_allclose(found, exact, atol=0.2)


@pytest.mark.parametrize("heads", [1, 2, 5])
def test_few_players(heads):
    found = contributions(additive(np.arange(heads)), heads, range(600), np.random.default_rng(0))
    assert found.shape == (heads,)
    assert np.isfinite(found).all()
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "contribution", [[[3.0, 1.0], [-1.0, 0.5]], [[1.0, 1.0], [1.0, 1.0]], [[9.0, 0.0], [0.0, 0.0]]]
)
def test_shares_by_contribution(keep, contribution):
    shares = np.concatenate(contribution_shares([np.array(layer) for layer in contribution], keep))
    assert shares.mean() == pytest.approx(keep, abs=1e-6)
    assert (shares >= 0.2 * keep - 1e-9).all()
    assert (shares <= 1 + 1e-9).all()
    order = np.argsort(np.concatenate(contribution), kind="stable")
    assert (np.diff(shares[order]) >= -1e-9).all()


def test_layers_of_a_pyramid_keep_different_numbers(fused):
    compiled = planish.compile(
        clone(fused),
        ["canonicalize", "fuse", Evict(policy="knorm", keep=0.4, sinks=0, recent=1, budget="pyramid")],
        target=TARGET,
    )
    decoder = compiled.decoder(capacity=40)
    compiled.generate(IDS, 1, decoder=decoder)
    assert decoder.cache.lengths.tolist() == [32, 1]  # 0.78 and 0.02 of 40, rounded up
    assert compiled.generate(IDS, 8).shape == (1, 48)


def test_layers_by_mass(fused, calibration):
    compiled = planish.compile(
        clone(fused),
        [
            "canonicalize",
            "fuse",
            Evict(policy="expected-attention", keep=0.5, sinks=0, recent=1, budget="prefix"),
        ],
        target=TARGET,
        calibration=[dict(calibration[0])],
    )
    decoder = compiled.decoder(capacity=40)
    compiled.generate(IDS, 1, decoder=decoder)
    assert sum(decoder.cache.lengths) in (40, 41, 42)  # each layer's number is rounded up


def test_a_coalition_of_all_heads_is_the_model(model, calibration):
    run_pipeline(model, Pipeline([RaiseCache()]), target=TARGET, calibration=calibration)
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (2, 60))
    coalitions = Coalitions(model, CalibrationData.read([{"input_ids": ids}], model))
    assert coalitions.heads == [KV_HEADS] * LAYERS
    everyone = np.ones(LAYERS * KV_HEADS, bool)
    # The loss is a difference of float32 logits' softmaxes: zero for equal ones.
    assert coalitions.utility(everyone) == pytest.approx(0.0, abs=1e-9)
    one_less = everyone.copy()
    one_less[0] = False
    assert coalitions.utility(~everyone) < coalitions.utility(one_less) < -1e-9


def test_short_texts_do_not_need_more_than_their_ends(model, calibration):
    """24 tokens are all within the first 4 and the last 32."""
    run_pipeline(model, Pipeline([RaiseCache()]), target=TARGET, calibration=calibration)
    nobody = np.zeros(LAYERS * KV_HEADS, bool)
    assert Coalitions(model, calibration).utility(nobody) == pytest.approx(0.0, abs=1e-9)


def test_budgets_by_contribution(fused, calibration):
    compiled = planish.compile(
        clone(fused),
        ["canonicalize", "fuse", Evict(policy="knorm", keep=0.5, recent=1, budget="cokv", draws=4)],
        target=TARGET,
        calibration=[dict(calibration[0])],
    )
    found = compiled.generate(IDS, 5)
    assert found.shape == (1, IDS.shape[1] + 5)


@pytest.mark.parametrize("passes", [[], [KVCache(bits=8)]], ids=["floats", "int8"])
def test_heads_with_caches_of_their_own_compute_the_same(fused, calibration, passes):
    """Everything is kept, so that only the split could change tokens."""
    data = [dict(calibration[0])]
    split = planish.compile(
        clone(fused),
        ["canonicalize", "fuse", *passes, Evict(policy="expected-attention", keep=1.0, budget="heads")],
        target=TARGET,
        calibration=data,
    )
    whole = planish.compile(clone(fused), ["canonicalize", "fuse", *passes], target=TARGET, calibration=data)
    np.testing.assert_array_equal(split.generate(IDS, 16), whole.generate(IDS, 16))
    caches = [value.name for value in split.bound.model.graph.inputs if value.name.startswith("past")]
    assert len(caches) == 2 * LAYERS * KV_HEADS
    assert {binding.kernel for binding in split.bound.bindings if "Cached" in binding.op} == {
        "GroupQueryAttention"
    }


def test_heads_keep_different_numbers(fused, calibration):
    compiled = planish.compile(
        clone(fused),
        [
            "canonicalize",
            "fuse",
            Evict(policy="snapkv", window=4, keep=0.5, sinks=0, recent=1, budget="heads"),
        ],
        target=TARGET,
        calibration=[dict(calibration[0])],
    )
    decoder = compiled.decoder(capacity=40)
    compiled.generate(IDS, 4, decoder=decoder)
    lengths = decoder.cache.lengths - 3
    # Two heads in two layers: four groups of one head, each number rounded up.
    assert len(lengths) == 4
    assert 80 <= sum(lengths) <= 84
    assert len(set(lengths)) > 1
