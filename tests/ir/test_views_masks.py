"""What a mask hides, read from the graph: a window found, and a twin for each part of the proof."""

import onnx_ir as ir
import pytest
from planish.ir.shapes import infer_shapes
from planish.ir.views.masks import causal_mask

GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
decoder (int64[batch, sequence] ids, bool[batch, total] shown, int64 past) => (bool[batch, 1, s, t] mask)
<int64 zero = {{0}}, int64 one = {{1}}, int64 width = {{4}}, int64[3] row = {{0, 1, 2}},
 int64[3] column = {{0, 1, 3}}, int64[2] middle = {{1, 2}}>
{{
  new_list = Shape <start: int = 1, end: int = 2> (ids)
  new = Squeeze (new_list)
  total_length = Add (past, new)
  key_range = Range (zero, {keys_end}, one)
  keys = Unsqueeze (key_range, row)
  steps = Range ({first}, new, one)
  moved = Add (steps, {offset})
  queries = Unsqueeze (moved, column)
  future_hidden = {causal}
  bound = {bound}
  near = {near}
  both = And (future_hidden, near)
  tokens = Unsqueeze (shown, middle)
  mask = {join} (both, tokens)
}}
"""
PARTS = {
    "keys_end": "total_length",
    "first": "zero",
    "offset": "past",
    "causal": "LessOrEqual (keys, queries)",
    "bound": "Sub (queries, width)",
    "near": "Greater (keys, bound)",
    "join": "And",
}


def mask_of(**changed):
    model = ir.from_onnx_text(GRAPH.format(**{**PARTS, **changed}))
    infer_shapes(model)
    return model.graph.outputs[0]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"causal": "GreaterOrEqual (queries, keys)"},
        {"near": "Less (bound, keys)"},
        {"bound": "Sub (queries, width)", "near": "Less (bound, keys)"},
    ],
)
def test_a_causal_mask_with_a_window(changed):
    found = causal_mask(mask_of(**changed))
    assert (found.past.name, found.total.name) == ("past", "total_length")
    assert (found.keys.name, found.queries.name) == ("keys", "queries")
    assert [value.name for value in found.others] == ["shown"]
    assert found.window == 4


@pytest.mark.parametrize(
    "changed",
    [
        {"near": "GreaterOrEqual (keys, bound)"},  # one more token than the width
        {"near": "Less (keys, bound)"},  # hides the window
        {"bound": "Sub (queries, new)"},  # as wide as the run, which changes
        {"bound": "Add (queries, width)"},
        {"bound": "Sub (keys, width)"},
    ],
)
def test_what_is_no_window(changed):
    found = causal_mask(mask_of(**changed))
    assert found.window is None
    assert len(found.others) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"join": "Or"},
        {"causal": "GreaterOrEqual (keys, queries)"},
        {"causal": "Less (keys, queries)"},  # hides a token from itself: not what kernels do
        {"offset": "one"},  # positions of queries do not begin behind the past
        {"first": "one"},
        {"keys_end": "new"},  # not all keys
    ],
)
def test_what_is_not_known_to_hide_the_future(changed):
    assert causal_mask(mask_of(**changed)) is None
