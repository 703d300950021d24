"""The grid of sizes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planish.passes.prune.levels import level_counts


def test_channels_shrink_by_a_factor_as_published():
    counts = level_counts(3072, kind="ffn")
    assert len(counts) == 44
    assert counts[:3] == [3072, 2765, 2488]
    assert {1814, 1322} < set(counts)
    assert counts[-1] == 33


def test_heads_go_one_by_one():
    assert level_counts(5, kind="attention", factor=0.5, multiple=4) == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(("multiple", "expected"), [(8, [100, 48, 24, 16, 8]), (1, [100, 50, 25, 12, 6, 3])])
def test_counts_are_multiples_except_for_the_dense_one(multiple, expected):
    assert level_counts(100, kind="ffn", factor=0.5, smallest=0.03, multiple=multiple) == expected


@given(
    structures=st.integers(1, 5000),
    kind=st.sampled_from(["ffn", "attention", "convolution", "hidden"]),
    factor=st.floats(0.2, 0.95),
    smallest=st.floats(0.005, 0.5),
    multiple=st.integers(1, 64),
)
def test_levels_fall_from_the_dense_one_and_keep_something(structures, kind, factor, smallest, multiple):
    counts = level_counts(structures, kind=kind, factor=factor, smallest=smallest, multiple=multiple)
    assert counts[0] == structures
    assert all(large > small for large, small in itertools.pairwise(counts))
    assert counts[-1] >= 1
