"""Differences and latencies against numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from planish.runtime import measure
from planish.runtime.measure import Latency, difference, interleaved_latency


def test_equal_arrays_have_no_difference():
    x = np.arange(6.0).reshape(2, 3) + 1
    result = difference(x, x, logits=True)
    # Cosine and KL are computed in float64: a few units in the last place.
    assert result.cosine_min == pytest.approx(1.0, abs=1e-12)
    assert result.max_absolute == 0
    assert result.max_relative == 0
    assert result.kl_divergence == pytest.approx(0.0, abs=1e-12)


def test_by_hand():
    result = difference(np.array([[1.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 4.0]]))
    assert result.cosine_min == pytest.approx(0.0, abs=1e-12)
    assert result.cosine_mean == pytest.approx(0.5)
    assert result.max_absolute == 1.0
    assert result.max_relative == 0.25


def test_kl_divergence_is_from_reference_to_value():
    value, reference = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    assert difference(value, reference, logits=True).kl_divergence == pytest.approx(expected)


def test_kl_divergence_survives_large_logits():
    assert np.isfinite(
        difference(np.array([[1e4, -1e4]]), np.array([[1e4, -9e3]]), logits=True).kl_divergence
    )


def test_zero_rows():
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert difference(zero, zero).cosine_min == 1.0
    assert difference(one, zero).max_relative == float("inf")
    assert difference(zero, one).cosine_min == 0.0


def test_empty_and_scalar():
    assert difference(np.zeros((0, 4)), np.zeros((0, 4))).max_absolute == 0
    assert difference(np.float32(2.0), np.float32(1.0)).max_relative == 1.0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"expected shape \[2\], found \[3\]"):
        difference(np.zeros(3), np.zeros(2))


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3), elements=st.floats(-10, 10, width=32)))
def test_cosine_ignores_positive_scale(x):
    # Scaling by a power of two is exact, so only the float64 dot products round.
    assert difference(2 * x, x).cosine_min == pytest.approx(1.0, abs=1e-9)


def test_latency_counts_calls_and_orders_by_cost():
    calls = {"a": 0, "b": 0}

    def run(name):
        calls[name] += 1

    result = interleaved_latency({n: lambda n=n: run(n) for n in calls}, repeats=5, warmup=2, burst=2)
    # 2 warm-up calls, then 3 bursts of 2 counted calls, each after one uncounted call.
    assert calls == {"a": 2 + 3 * 3, "b": 2 + 3 * 3}
    assert result["a"].samples == 6
    assert result["a"].fastest_ms <= result["a"].steady_ms <= result["a"].median_ms


def test_a_speedup_is_that_of_the_rounds_and_not_of_the_medians():
    def latency(*rounds):
        return Latency(median_ms=0, fastest_ms=0, steady_ms=0, samples=len(rounds), rounds_ms=rounds)

    # The machine was slow in the second and third round; the medians' ratio would be 4.
    assert latency(1, 3, 4).speedup_over(latency(2, 6, 16)) == 2


def test_a_round_is_what_a_burst_took():
    clock = iter(np.cumsum([1.0, 2, 1, 4, 1, 3, 1, 8, 1, 2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
        latency = interleaved_latency({"a": lambda: None}, repeats=4, warmup=0, burst=2)["a"]
    # Between the two looks at the clock: 2 and 4, then 3 and 8.
    assert latency.rounds_ms == (3000, 5500)
    assert (latency.fastest_ms, latency.steady_ms, latency.median_ms) == (2000, 2500, 3500)
