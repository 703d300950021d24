"""Masks by magnitude against sorting, and the courses of gradual pruning and AC/DC against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.passes.sparsify.ac_dc import AlternatingCompression
from planish.passes.sparsify.gradual_magnitude import GradualMagnitude
from planish.passes.sparsify.masks import Pruner, two_of_four


def parameters(shapes, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    draw = (lambda shape: rng.integers(-3, 4, shape).astype(float)) if integers else rng.standard_normal
    return {name: torch.nn.Parameter(torch.from_numpy(draw(shape))) for name, shape in shapes.items()}


def pruner(axes, pattern="unstructured", scope="global"):
    return Pruner(axes=axes, pattern=pattern, scope=scope)


SHAPES = {"a": (8, 6), "b": (4, 5), "c": (3, 8, 2, 2)}
AXES = {"a": 0, "b": 0, "c": 1}


@settings(max_examples=50, deadline=None)
@given(
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 1000),
    integers=st.booleans(),
    scope=st.sampled_from(["global", "layer"]),
)
def test_unstructured_masks_prune_exactly_the_least(sparsity, seed, integers, scope):
    """Integers are full of ties."""
    weights = parameters(SHAPES, seed, integers)
    masks = pruner(AXES, scope=scope).choose(weights, sparsity)
    assert {name: mask.shape for name, mask in masks.items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    groups = [list(SHAPES)] if scope == "global" else [[name] for name in SHAPES]
    for group in groups:
        magnitudes = np.concatenate([weights[name].abs().detach().numpy().ravel() for name in group])
        pruned = np.concatenate([masks[name].numpy().ravel() for name in group])
        count = round(sparsity * len(magnitudes))
        assert pruned.sum() == count
        np.testing.assert_array_equal(np.sort(magnitudes[pruned]), np.sort(magnitudes)[:count])


def fours(mask, axis):
    return np.moveaxis(mask.numpy(), axis, -1).reshape(-1, 4)


@pytest.mark.parametrize("integers", [False, True])
def test_two_of_four_along_the_summed_axis(integers):
    weights = parameters(SHAPES, integers=integers)
    for name, axis in AXES.items():
        mask = two_of_four(weights[name].detach().abs(), axis)
        assert mask.shape == weights[name].shape
        magnitudes = fours(weights[name].detach().abs(), axis)
        np.testing.assert_array_equal(fours(mask, axis).sum(1), 2)
        kept = np.where(fours(mask, axis), np.inf, magnitudes).min(1)
        assert (np.where(fours(mask, axis), magnitudes, 0).max(1) <= kept).all()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_on_the_way_to_two_of_four_no_group_loses_more_than_two(scope):
    weights = parameters(SHAPES)
    chooser = pruner(AXES, "2:4", scope)
    previous = 0
    for sparsity in (0.0, 0.2, 0.4, 0.5):
        masks = chooser.choose(weights, sparsity)
        for name, axis in AXES.items():
            assert fours(masks[name], axis).sum(1).max() <= 2
        pruned = sum(int(mask.sum()) for mask in masks.values())
        sizes = [weight.numel() for weight in weights.values()]
        assert pruned == (
            round(sparsity * sum(sizes)) if scope == "global" else sum(round(sparsity * n) for n in sizes)
        )
        assert pruned >= previous
        previous = pruned
    assert all((fours(masks[name], axis).sum(1) == 2).all() for name, axis in AXES.items())


def gradual(**options):
    defaults = {"sparsity": 0.8, "steps": 14, "initial_sparsity": 0.2, "rising": 10, "frequency": 4}
    return GradualMagnitude(pruner=pruner({"w": 0}), **defaults | options)


def test_the_cubic_schedule():
    method = gradual()
    expected = [0.8 - 0.6 * (1 - t / 10) ** 3 for t in range(11)] + [0.8] * 4
    assert [method.sparsity_at(step) for step in range(15)] == pytest.approx(expected)
    assert (method.sparsity_at(0), method.sparsity_at(10)) == pytest.approx((0.2, 0.8))


def test_gradual_masks_change_at_the_frequency_and_at_the_end_of_the_rise():
    method, weights = gradual(), {"w": torch.nn.Parameter(torch.arange(1.0, 101.0)[:, None])}
    shares = []
    for step in range(15):
        weights["w"].data.add_(1.0)  # what an update would do to all weights, pruned ones included
        method.after_step(step, weights)
        shares.append(int((weights["w"] == 0).sum()))
    at = {step: round(100 * method.sparsity_at(step)) for step in (0, 4, 8, 10)}
    assert shares == 4 * [at[0]] + 4 * [at[4]] + 2 * [at[8]] + 5 * [80]


def test_pruned_weights_have_no_gradient():
    method, weights = gradual(), {"w": torch.nn.Parameter(torch.arange(1.0, 11.0)[:, None])}
    weights["other"] = torch.nn.Parameter(torch.ones(3))
    method.after_step(0, weights)
    for weight in weights.values():
        weight.grad = torch.ones_like(weight)
    method.before_step(weights)
    assert weights["w"].grad[:, 0].tolist() == [0, 0] + 8 * [1]
    assert weights["other"].grad.tolist() == [1, 1, 1]


def alternating(**options):
    defaults = {"sparsity": 0.5, "steps": 20, "dense": 3, "phase": 4, "final": 5}
    return AlternatingCompression(pruner=pruner({"w": 0}), **defaults | options)


def test_phases_of_ac_dc():
    phases = "".join("C" if alternating().is_compressed_at(step) else "d" for step in range(21))
    assert phases == "ddd" + "CCCC" + "dddd" + "CCCC" + "CCCCC" + "C"
    phases = "".join("C" if alternating(phase=6).is_compressed_at(step) else "d" for step in range(21))
    assert phases == "ddd" + "CCCCCC" + "dddddd" + "CCCCC" + "C"


def test_ac_dc_lets_weights_grow_back_and_ends_sparse():
    method, weights = alternating(), {"w": torch.nn.Parameter(torch.arange(1.0, 11.0))}
    zeros, masks = [], []
    for step in range(21):
        if step >= 7:
            # From the decompressed phase on, updates push the small weights up: the first choice was wrong.
            weights["w"].data.add_(torch.linspace(4.0, 0.5, 10))
        method.after_step(step, weights)
        zeros.append(int((weights["w"] == 0).sum()))
        masks.append(method.masks.get("w"))
    assert zeros == 3 * [0] + 4 * [5] + 4 * [0] + 10 * [5]
    assert masks[3].tolist() == 5 * [True] + 5 * [False]
    assert not torch.equal(masks[3], masks[11])
    assert torch.equal(masks[11], masks[20])


@pytest.mark.parametrize("make", [gradual, alternating])
def test_the_course_of_a_restored_method_is_the_same(make):
    method, weights = make(), {"w": torch.nn.Parameter(torch.arange(1.0, 11.0)[:, None])}
    for step in range(6):
        method.after_step(step, weights)
    again = make()
    again.restore(method.state())
    copy = {"w": torch.nn.Parameter(weights["w"].detach().clone())}
    for step in range(6, 15):
        for each, values in ((method, weights), (again, copy)):
            values["w"].data.add_(0.5)
            each.after_step(step, values)
        assert torch.equal(weights["w"], copy["w"])
    assert repr(make()) == repr(method)  # the masks are a state and no setting
