"""Batches: every sample once a round, shapes apart, an order that only the seed and the step decide."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import InputError
from planish.runtime.training.batches import Batches, feeds_for


def model_of(inputs):
    text = f'<ir_version: 11, opset_import: ["": 23]> net ({inputs}) => (float[n, s] y) {{ y = Relu(x) }}'
    return ir.from_proto(onnx.parser.parse_model(text))


FREE = model_of("float[n, s] x")


def numbered(sizes, lengths=None):
    """Batches of these sizes whose rows hold the number of their sample."""
    data, start = [], 0
    for size, length in zip(sizes, lengths or [3] * len(sizes), strict=True):
        numbers = np.arange(start, start + size, dtype=np.float32)
        data.append({"x": np.repeat(numbers[:, None], length, axis=1), "labels": numbers.astype(np.int64)})
        start += size
    return data


def rows_of(batches, steps):
    return [sorted(batches.at(step)["labels"].tolist()) for step in steps]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    size=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_every_sample_is_seen_once_a_round_or_held_out(sizes, size, seed, data):
    lengths = [data.draw(st.integers(1, 2)) for _ in sizes]
    batches = Batches(numbered(sizes, lengths), FREE, size=size, held_out=0.3, seed=seed)
    held_out = [int(label) for chunk in batches.held_out for label in batches.assemble(chunk)["labels"]]
    trained = sorted(set(range(sum(sizes))) - set(held_out))
    assert len(set(held_out)) == len(held_out) == max(1, round(0.3 * sum(sizes)))
    seen, step = [], 0
    while len(seen) < 2 * len(trained):
        feeds = batches.at(step)
        assert 1 <= len(feeds["x"]) <= size
        np.testing.assert_array_equal(feeds["x"][:, 0], feeds["labels"])
        seen += feeds["labels"].tolist()
        step += 1
    first, second = seen[: len(trained)], seen[len(trained) :]
    assert sorted(first) == sorted(second) == trained


def test_rounds_differ_and_the_seed_decides():
    data = numbered([16])
    one, same, other = (Batches(data, FREE, size=4, held_out=0.0, seed=seed) for seed in (1, 1, 2))
    steps = range(6)
    assert rows_of(one, steps) == rows_of(same, reversed(steps))[::-1]
    assert rows_of(one, steps) != rows_of(other, steps)
    assert rows_of(one, range(4)) != rows_of(one, range(4, 8))


def test_lengths_do_not_meet():
    batches = Batches(numbered([3, 3, 3], [2, 5, 2]), FREE, size=9, held_out=0.1, seed=0)
    assert sorted(len(batches.at(step)["x"]) for step in range(2)) in ([2, 6], [3, 5])


@pytest.mark.parametrize("inputs", ["float[4, s] x", "float[n, s] x, float[m, s] z"])
def test_batches_without_a_free_common_axis_stay_whole(inputs):
    data = numbered([4, 4, 4])
    if "z" in inputs:
        data = [feeds | {"z": np.ones((4, 1), np.float32)} for feeds in data]
    batches = Batches(data, model_of(inputs), size=2, held_out=0.1, seed=0)
    assert {len(batches.at(step)["x"]) for step in range(4)} == {4}


def test_arrays_without_the_batch_axis_keep_a_batch_whole():
    data = [feeds | {"labels": np.float32(1)} for feeds in numbered([4, 4])]
    batches = Batches(data, FREE, size=2, held_out=0.1, seed=0)
    assert len(batches.at(0)["x"]) == 4


def test_a_single_sample_serves_both_ends():
    batches = Batches(numbered([1]), FREE, size=8, held_out=0.5, seed=0)
    np.testing.assert_array_equal(batches.at(7)["x"], batches.assemble(batches.held_out[0])["x"])


def test_no_more_than_sixteen_batches_are_held_out():
    batches = Batches(numbered([200]), FREE, size=2, held_out=0.5, seed=0)
    assert sum(map(len, batches.held_out)) == 32


def test_no_data():
    with pytest.raises(InputError, match="training needs data, and there is none"):
        Batches([], FREE, size=8, held_out=0.1, seed=0)


CACHED = model_of(
    "float[n, s] x, float[n, 4, p, 8] past_key_values.0.key, float[n, 2, p, 8] past_key_values.1.key".replace(
        "past_key_values.0.key", '"past_key_values.0.key"'
    ).replace("past_key_values.1.key", '"past_key_values.1.key"')
)


def test_a_dropped_layers_cache_and_one_of_other_heads_begin_empty():
    x = np.ones((3, 5), np.float32)
    feeds = {"x": x, "past_key_values.0.key": np.zeros((3, 1, 0, 8), np.float32), "labels": np.arange(3)}
    found = feeds_for(CACHED, feeds)
    assert {name: array.shape for name, array in found.items()} == {
        "x": (3, 5),
        "past_key_values.0.key": (3, 4, 0, 8),
        "past_key_values.1.key": (3, 2, 0, 8),
    }
    assert found["x"] is x


def test_filled_caches_cannot_be_refitted():
    feeds = {
        "x": np.ones((3, 5), np.float32),
        "past_key_values.0.key": np.zeros((3, 4, 2, 8), np.float32),
    }
    with pytest.raises(InputError, match=r"'past_key_values.1.key' is missing, and the cache .* not empty"):
        feeds_for(CACHED, feeds)


def test_other_inputs_must_be_there():
    with pytest.raises(InputError, match="input 'x' is missing"):
        feeds_for(FREE, {"y": np.ones((2, 2), np.float32)})
    with pytest.raises(InputError, match=r"input 'x' has the shape \[3\]"):
        feeds_for(FREE, {"x": np.ones(3, np.float32)})
