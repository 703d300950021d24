"""Times as the search sees them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planish.passes.prune.time_goal import _falling


def test_a_smaller_level_that_seems_slower_is_evened_out():
    np.testing.assert_allclose(_falling([3.0, 2.0, 2.5, 1.0, 0.0]), [3, 2.25, 2.25, 1, 0])


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_times_never_rise_and_keep_their_sum(seconds):
    found = _falling(seconds)
    assert (np.diff(found) <= 0).all()
    assert found.sum() == pytest.approx(sum(seconds), abs=1e-9)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_falling_times_stay(seconds):
    falling = sorted(seconds, reverse=True)
    np.testing.assert_allclose(_falling(falling), falling)
