"""Drafts against a search through the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planish.ir.errors import InputError
from planish.runtime.generate.prompt_lookup import Drafter, PromptLookup


def searched(text, lookup, count):
    """What followed the latest earlier place of the longest n-gram that ends the text."""
    for size in range(lookup.longest, lookup.shortest - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if len(text) >= size and text[end - size : end] == text[-size:]:
                return text[end : end + count]
    return []


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 5),
)
def test_a_draft_is_what_followed_the_same_tokens(text, shortest, more, tokens):
    lookup = PromptLookup(shortest=shortest, longest=shortest + more, tokens=tokens)
    drafter = Drafter(lookup)
    drafter.extend(text[:7])
    drafter.extend(text[7:])
    drafter.learn(tokens)
    assert drafter.draft() == searched(text, lookup, tokens)


def test_drafts_grow_while_they_are_right_and_shrink_when_wrong():
    drafter = Drafter(PromptLookup(shortest=1, longest=1, tokens=6))
    drafter.extend([1, 2, 3, 4, 5, 6, 7, 8, 1])
    lengths = []
    for kept in (2, 4, 6, 0):
        lengths.append(len(drafter.draft()))
        drafter.learn(kept)
    assert [*lengths, len(drafter.draft())] == [2, 4, 6, 6, 2]


@pytest.mark.parametrize("options", [{"shortest": 0}, {"longest": 1, "shortest": 2}, {"tokens": 0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(InputError, match="prompt lookup"):
        PromptLookup(**options)
