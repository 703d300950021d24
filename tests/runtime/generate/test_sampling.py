"""Samplers against transformers' filters, and against what they promise about their draws."""

import numpy as np
import pytest
import torch
from planish.ir.errors import InputError
from planish.runtime.generate.sampling import Sampler, Sampling, filtered
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def logits(rows=5, vocabulary=50, seed=0):
    return (3 * np.random.default_rng(seed).standard_normal((rows, vocabulary))).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_filters_are_those_of_transformers(options):
    rows = logits()
    expected = torch.from_numpy(rows.astype(np.float64))
    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    for name, warper in warpers.items():
        if name in options:
            expected = warper(options[name])(None, expected)
    found = filtered(rows, Sampling(**options))
    np.testing.assert_allclose(found, expected.softmax(-1).numpy(), atol=1e-12)


def test_without_sampling_the_likeliest_token():
    rows = logits()
    np.testing.assert_array_equal(Sampler(None, batch=5, seed=0)(rows), rows.argmax(-1))


def test_draws_have_the_filtered_probabilities():
    row = logits(1, 6)
    sampling = Sampling(top_k=3)
    draws = Sampler(sampling, batch=20_000, seed=1)(np.repeat(row, 20_000, axis=0))
    shares = np.bincount(draws, minlength=6) / 20_000
    # Four standard deviations of a share of 20,000 draws.
    np.testing.assert_allclose(shares, filtered(row, sampling)[0], atol=4 * 0.5 / np.sqrt(20_000))
    assert set(np.flatnonzero(shares)) == set(np.argsort(row[0])[-3:])


def test_the_seed_decides():
    rows = logits(100)
    first, second, other = (Sampler(Sampling(), batch=100, seed=seed)(rows) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_mirostat_holds_its_surprise():
    sampler = Sampler(Sampling(mirostat_tau=3.0, mirostat_eta=0.2), batch=1, seed=0)
    row = logits(1, 1000)
    probabilities = np.exp(row[0] - row.max())
    surprise = -np.log2(probabilities / probabilities.sum())
    seen = [surprise[int(sampler(row)[0])] for _ in range(2000)]
    # Unfiltered, the mean would be the entropy. What steps of eta sum up to is bounded, so the mean over many
    # steps is near to the goal; 0.2 is about six standard errors of the draws.
    assert (2**-surprise * surprise).sum() > 4
    assert np.mean(seen[500:]) == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"mirostat_tau": -1.0}, "mirostat_tau"),
        ({"mirostat_tau": 3.0, "top_k": 4}, "takes the place"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


def test_nan_logits_are_an_error():
    rows = logits()
    rows[2, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        Sampler(None, batch=5, seed=0)(rows)
