"""Shrinking: what goes had no effect, and every tensor, shape and attribute says the new sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from planish.ir import clone, infer_shapes, verify
from planish.ir.errors import InputError
from planish.ir.structure import Choice, discover, shrink

Parse = Callable[[str], ir.Model]
Anything = Callable[..., Any]

# The sums of doubles have the same terms that are not zero, perhaps in another order: a thousand roundings.
EXACT = 1e-13

GRAPHS = {
    "plain": """
    g (double[b, s, 4] x) => (double[b, s, 4] y)
    <double[4, 6] up__weight, double[6] up__bias, double[6, 4] down__weight>
    { u = MatMul(x, up__weight)  ub = Add(u, up__bias)  r = Relu(ub)  d = MatMul(r, down__weight)
      y = Add(x, d) }""",
    "gemm": """
    g (double[b, 4] x) => (double[b, 3] y)
    <double[6, 4] up__weight, double[6] up__bias, double[6, 3] down__weight, double[3] down__bias>
    { u = Gemm <transB = 1> (x, up__weight, up__bias)  r = Tanh(u)
      y = Gemm(r, down__weight, down__bias) }""",
    "merged gate": """
    g (double[b, s, 4] x) => (double[b, s, 4] y)
    <double[4, 12] gate_up__weight, double[6, 4] down__weight>
    { gu = MatMul(x, gate_up__weight)  g, u = Split <axis = -1, num_outputs = 2> (gu)  s = Sigmoid(g)
      a = Mul(g, s)  h = Mul(a, u)  y = MatMul(h, down__weight) }""",
    "sequence of parts": """
    g (double[b, s, 4] x) => (double[b, s, 4] y)
    <double[4, 12] gate_up__weight, double[6, 4] down__weight, int64 size = {6}, int64 i = {0}, int64 j = {1}>
    { gu = MatMul(x, gate_up__weight)  parts = SplitToSequence <axis = -1> (gu, size)
      g = SequenceAt(parts, i)  u = SequenceAt(parts, j)  h = Mul(g, u)  y = MatMul(h, down__weight) }""",
    "slices": """
    g (double[b, s, 4] x) => (double[b, s, 4] y)
    <double[4, 12] gate_up__weight, double[6, 4] down__weight,
     int64[1] o = {0}, int64[1] six = {6}, int64[1] end = {9223372036854775807}, int64[1] last = {-1}>
    { gu = MatMul(x, gate_up__weight)  g = Slice(gu, o, six, last)  u = Slice(gu, six, end, last)
      h = Mul(g, u)  y = MatMul(h, down__weight) }""",
    "slices from the end": """
    g (double[b, s, 4] x) => (double[b, s, 4] y)
    <double[4, 12] gate_up__weight, double[6, 4] down__weight,
     int64[1] o = {0}, int64[1] middle = {-6}, int64[1] end = {12}, int64[1] last = {-1}>
    { gu = MatMul(x, gate_up__weight)  g = Slice(gu, o, middle, last)  u = Slice(gu, middle, end, last)
      h = Mul(g, u)  y = MatMul(h, down__weight) }""",
    "heads": """
    g (double[b, s, 8] x) => (double[b, s, 8] y)
    <double[8, 12] q__weight, double[12] q__bias, double[8, 6] k__weight, double[8, 6] v__weight,
     double[12, 8] o__weight,
     int64[4] qs = {0, 0, 6, 2}, int64[4] ks = {0, 0, 3, 2}, int64[3] flat = {0, 0, 12}>
    { qm = MatMul(x, q__weight)  qb = Add(qm, q__bias)
      qr = Reshape(qb, qs)  q = Transpose <perm = [0, 2, 1, 3]> (qr)
      km = MatMul(x, k__weight)  kr = Reshape(km, ks)  k = Transpose <perm = [0, 2, 1, 3]> (kr)
      vm = MatMul(x, v__weight)  vr = Reshape(vm, ks)  v = Transpose <perm = [0, 2, 1, 3]> (vr)
      a = Attention(q, k, v)  at = Transpose <perm = [0, 2, 1, 3]> (a)  ar = Reshape(at, flat)
      y = MatMul(ar, o__weight) }""",
    "flat heads": """
    g (double[b, s, 8] x) => (double[b, s, 8] y)
    <double[8, 24] qkv__weight, double[12, 8] o__weight, int64[3] widths = {12, 6, 6}>
    { m = MatMul(x, qkv__weight)  q, k, v = Split <axis = -1> (m, widths)
      a = Attention <q_num_heads = 6, kv_num_heads = 3> (q, k, v)  y = MatMul(a, o__weight) }""",
    "spelled out attention": """
    g (double[b, s, 8] x) => (double[b, s, 8] y)
    <double[8, 12] q__weight, double[8, 12] k__weight, double[8, 12] v__weight, double[12, 8] o__weight,
     int64[4] heads = {0, 0, 6, 2}, int64[3] flat = {0, 0, 12}>
    { qm = MatMul(x, q__weight)  qr = Reshape(qm, heads)  q = Transpose <perm = [0, 2, 1, 3]> (qr)
      km = MatMul(x, k__weight)  kr = Reshape(km, heads)  k = Transpose <perm = [0, 2, 3, 1]> (kr)
      vm = MatMul(x, v__weight)  vr = Reshape(vm, heads)  v = Transpose <perm = [0, 2, 1, 3]> (vr)
      z = MatMul(q, k)  p = Softmax <axis = -1> (z)  a = MatMul(p, v)
      at = Transpose <perm = [0, 2, 1, 3]> (a)  ar = Reshape(at, flat)  y = MatMul(ar, o__weight) }""",
    "convolutions": """
    g (double[b, 3, 5, 5] x) => (double[b, 5] y)
    <double[4, 3, 3, 3] a__weight, double[4] n__scale, double[4] n__bias, double[4] n__mean, double[4] n__var,
     double[8, 1, 3, 3] b__weight, double[8] b__bias, double[6, 8, 1, 1] c__weight, double[54, 5] d__weight>
    { a = Conv(x, a__weight)  n = BatchNormalization(a, n__scale, n__bias, n__mean, n__var)  r = Relu(n)
      dw = Conv <group = 4, pads = [1, 1, 1, 1]> (r, b__weight, b__bias)  c = Conv(dw, c__weight)
      f = Flatten(c)  y = MatMul(f, d__weight) }""",
    "grouped convolution": """
    g (double[b, 3, 4, 4] x) => (double[b, 5, 4, 4] y)
    <double[6, 3, 1, 1] a__weight, double[9, 2, 1, 1] b__weight, double[5, 9, 1, 1] c__weight>
    { a = Conv(x, a__weight)  h = Conv <group = 3> (a, b__weight)  y = Conv(h, c__weight) }""",
    "group norm": """
    g (double[b, 3, 4, 4] x) => (double[b, 5, 4, 4] y)
    <double[6, 3, 1, 1] a__weight, double[6] n__scale, double[6] n__bias, double[5, 6, 1, 1] c__weight>
    { a = Conv(x, a__weight)  n = GroupNormalization <num_groups = 3> (a, n__scale, n__bias)
      y = Conv(n, c__weight) }""",
    "dense": """
    g (double[b, 3, 4, 4] x) => (double[b, 5, 4, 4] y)
    <double[4, 3, 1, 1] a__weight, double[3, 4, 1, 1] b__weight, double[5, 7, 1, 1] c__weight>
    { a = Conv(x, a__weight)  p = Conv(a, b__weight)  ab = Concat <axis = 1> (a, p)
      y = Conv(ab, c__weight) }""",
    "squeeze and excite": """
    g (double[b, 3, 4, 4] x) => (double[b, 5, 4, 4] y)
    <double[6, 3, 1, 1] a__weight, double[2, 6, 1, 1] down__weight, double[6, 2, 1, 1] up__weight,
     double[5, 6, 1, 1] c__weight>
    { a = Conv(x, a__weight)  p = GlobalAveragePool(a)  d = Conv(p, down__weight)  r = Relu(d)
      u = Conv(r, up__weight)  gate = Sigmoid(u)  m = Mul(a, gate)  y = Conv(m, c__weight) }""",
    "expanded": """
    g (double[b, s, 4] x) => (double[b, s, 4] y)
    <double[4, 6] up__weight, double[1, 1, 6] gain__weight, double[6, 4] down__weight, int64[1] six = {6}>
    { u = MatMul(x, up__weight)  bs = Shape <start = 0, end = 2> (u)  shape = Concat <axis = 0> (bs, six)
      e = Expand(gain__weight, shape)  m = Mul(u, e)  y = MatMul(m, down__weight) }""",
}


def parsed(graph: Parse, name: str) -> ir.Model:
    model = graph(GRAPHS[name])
    for node in model.graph:
        if (
            node.op_type == "SequenceAt"
        ):  # inference does not follow sequences, tracing writes the shapes down
            node.outputs[0].shape = ir.Shape(["b", "s", 6])
            node.outputs[0].dtype = ir.DataType.DOUBLE
    infer_shapes(model)
    return model


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    (value,) = model.graph.inputs
    assert value.shape is not None
    return {"x": rng.standard_normal([dim if isinstance(dim, int) else 2 for dim in value.shape])}


def shapes(model: ir.Model) -> dict[str, list[int | None]]:
    return {
        value.name or "": [dim if isinstance(dim, int) else None for dim in value.shape]
        for node in model.graph
        for value in node.outputs
        if value.shape is not None
    }


@pytest.mark.parametrize("name", sorted(GRAPHS))
@pytest.mark.parametrize("seed", range(2))
def test_what_goes_had_no_effect(
    graph: Parse, run: Anything, choices_of: Anything, zeroed: Anything, name: str, seed: int
) -> None:
    model = parsed(graph, name)
    choices = choices_of(discover(model).groups, seed)
    assert choices
    dense = zeroed(model, choices)
    shrunk = clone(dense)
    shrink(shrunk, choices)
    verify(shrunk)
    fed = feeds(model)
    np.testing.assert_allclose(run(shrunk, fed)["y"], run(dense, fed)["y"], rtol=EXACT, atol=EXACT)
    # The weights were not zero to begin with: had they counted, it would show.
    assert np.abs(run(shrunk, fed)["y"] - run(model, fed)["y"]).max() > 1e-3
    for choice in choices:
        for member in choice.group.members:
            kept = shrunk.graph.initializers[member.tensor].shape
            gone = (choice.group.structures - len(choice.keep)) * member.width
            before = model.graph.initializers[member.tensor].shape
            assert kept is not None
            assert before is not None
            others = [
                (other.group.structures - len(other.keep)) * m.width
                for other in choices
                for m in other.group.members
                if (m.tensor, m.axis) == (member.tensor, member.axis) and other is not choice
            ]
            assert kept[member.axis] == before[member.axis] - gone - sum(others)


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_shapes_are_those_that_inference_finds(graph: Parse, choices_of: Anything, name: str) -> None:
    model = parsed(graph, name)
    shrink(model, choices_of(discover(model).groups))
    written = shapes(model)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    infer_shapes(model)
    assert {value: written[value] for value in shapes(model)} == shapes(model)


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_shrinking_twice_is_shrinking_once(graph: Parse, run: Anything, name: str) -> None:
    """A structure can be found again in what was shrunk, and shrunk further."""
    once, twice = parsed(graph, name), parsed(graph, name)
    groups = [group for group in discover(once).groups if group.structures > 2]
    shrink(once, [Choice(group, np.array([group.structures - 1])) for group in groups])
    names = {group.name for group in groups}
    shrink(twice, [Choice(group, np.array([0, group.structures - 1])) for group in groups])
    again = [group for group in discover(twice).groups if group.name in names]
    assert [group.structures for group in again] == [2] * len(names)
    shrink(twice, [Choice(group, np.array([1])) for group in again])
    np.testing.assert_array_equal(run(twice, feeds(once))["y"], run(once, feeds(once))["y"])


def test_keeping_everything_changes_nothing(graph: Parse, run: Anything) -> None:
    model = graph(GRAPHS["heads"])
    shrunk = clone(model)
    shrink(shrunk, [Choice(group, np.arange(group.structures)) for group in discover(model).groups])
    np.testing.assert_array_equal(run(shrunk, feeds(model))["y"], run(model, feeds(model))["y"])


def test_attributes_and_constants_say_the_new_sizes(graph: Parse) -> None:
    model = graph(GRAPHS["flat heads"])
    shrink(model, [Choice(discover(model).groups[0], np.array([0, 2]))])
    attention = next(node for node in model.graph if node.op_type == "Attention")
    assert attention.attributes["q_num_heads"].as_int() == 4
    assert attention.attributes["kv_num_heads"].as_int() == 2
    split = next(node for node in model.graph if node.op_type == "Split")
    sizes = split.inputs[1]
    assert sizes is not None
    assert sizes.const_value is not None
    assert sizes.const_value.numpy().tolist() == [8, 4, 4]
    assert "widths" not in model.graph.initializers


def test_shared_shape_constants_are_replaced_for_those_who_shrink(graph: Parse) -> None:
    model = graph(
        """
        g (double[b, s, 8] x) => (double[b, s, 8] y)
        <double[8, 8] a__weight, double[8, 8] c__weight, double[8, 8] d__weight,
         int64[4] heads = {0, 0, 4, 2}, int64[3] flat = {0, 0, 8}>
        { a = MatMul(x, a__weight)  ar = Reshape(a, heads)  at = Relu(ar)  af = Reshape(at, flat)
          c = MatMul(af, c__weight)  cr = Reshape(c, heads)  ct = Relu(cr)  cf = Reshape(ct, flat)
          y = MatMul(cf, d__weight) }"""
    )
    first, second = discover(model).groups
    shrink(model, [Choice(first, np.array([1])), Choice(second, np.arange(second.structures))])
    constants = [
        node.inputs[1].const_value.numpy().tolist()  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "Reshape"
    ]
    assert constants == [[0, 0, 1, 2], [0, 0, 2], [0, 0, 4, 2], [0, 0, 8]]


def test_new_weights(graph: Parse, run: Anything) -> None:
    """Values at what stays are taken from them, also where nothing goes; at what goes they do not matter."""
    model = graph(GRAPHS["plain"])
    (group,) = discover(model).groups
    rng = np.random.default_rng(3)
    down, bias = rng.standard_normal((6, 4)), rng.standard_normal(6)
    down[[0, 2, 3]] = np.nan
    shrink(model, [Choice(group, np.array([1, 4, 5]), {"down.weight": down, "up.bias": bias})])
    x = feeds(model)["x"]
    up = model.graph.initializers["up.weight"].const_value
    assert up is not None
    expected = x + np.maximum(x @ up.numpy() + bias[[1, 4, 5]], 0) @ down[[1, 4, 5]]
    np.testing.assert_allclose(run(model, {"x": x})["y"], expected, rtol=EXACT, atol=EXACT)


def test_weights_keep_their_type(graph: Parse) -> None:
    model = graph(GRAPHS["plain"])
    (group,) = discover(model).groups
    shrink(model, [Choice(group, np.array([0]), {"down.weight": np.ones((6, 4), np.float32)})])
    assert model.graph.initializers["down.weight"].dtype == ir.DataType.DOUBLE
    verify(model)


def test_members_that_a_piece_lacks_are_passed_over(graph: Parse) -> None:
    """A piece of the model may end in the middle of a group: its inputs and outputs shrink too."""
    model = graph(GRAPHS["plain"])
    (group,) = discover(model).groups
    piece = graph(
        """
        piece (double[b, s, 6] r) => (double[b, s, 4] d) <double[6, 4] down__weight>
        { d = MatMul(r, down__weight) }"""
    )
    shrink(piece, [Choice(group, np.array([2, 3]))])
    verify(piece)
    (value,) = piece.graph.inputs
    assert value.shape is not None
    assert value.shape[2] == 2


STREAM = """
stream (int64[b, s] ids) => (double[b, s, 9] y)
<double[9, 4] embed__weight, double[4] n1__weight, double[4, 6] up__weight, double[6, 4] down__weight,
 double[4] n2__weight, double[4, 9] head__weight>
{
  x = Gather(embed__weight, ids)  h = RMSNormalization <axis = -1, epsilon = 0.25> (x, n1__weight)
  u = MatMul(h, up__weight)  r = Relu(u)  d = MatMul(r, down__weight)  x2 = Add(x, d)
  f = RMSNormalization <axis = -1, epsilon = 0.125> (x2, n2__weight)  y = MatMul(f, head__weight)
}
"""


@pytest.mark.parametrize("seed", range(3))
def test_zero_channels_of_the_stream(
    graph: Parse, run: Anything, choices_of: Anything, zeroed: Anything, seed: int
) -> None:
    """Large epsilons, so that a wrong one would show; float32 attributes hold them exactly."""
    model = graph(STREAM)
    choices = choices_of(discover(model).groups[-1:], seed)
    dense = zeroed(model, choices, ["producer"])
    shrunk = clone(dense)
    shrink(shrunk, choices)
    verify(shrunk)
    fed = {"ids": np.array([[3, 1, 4], [1, 5, 8]])}
    # ε is stored in single precision, which rounds ε · d / d′ to 24 bits.
    np.testing.assert_allclose(run(shrunk, fed)["y"], run(dense, fed)["y"], rtol=2**-23)


WRONG = {
    "nothing": ([], r"group 'up' is to keep \[\] — give ascending numbers of structures from 0 to 5"),
    "twice": ([1, 1], r"to keep \[1, 1\]"),
    "unordered": ([2, 1], r"to keep \[2, 1\]"),
    "too many": ([0, 6], r"to keep \[0, 6\]"),
    "negative": ([-1, 2], r"to keep \[-1, 2\]"),
}


@pytest.mark.parametrize("why", sorted(WRONG))
def test_choices_that_make_no_sense(graph: Parse, why: str) -> None:
    keep, message = WRONG[why]
    text = "g (double[b, 4] x) => (double[b, 3] y) <double[4, 6] up__a__weight, double[6, 3] up__b__weight>"
    model = graph(text + "{ u = MatMul(x, up__a__weight)  y = MatMul(u, up__b__weight) }")
    (group,) = discover(model).groups
    before = str(model)
    with pytest.raises(InputError, match=message):
        shrink(model, [Choice(group, np.array(keep, np.int64))])
    assert str(model) == before


def test_a_choice_for_another_model(graph: Parse) -> None:
    model = graph(GRAPHS["plain"])
    (group,) = discover(model).groups
    shrink(model, [Choice(group, np.array([0, 1]))])
    with pytest.raises(InputError, match=r"needs index 5 of axis \d of '\w+.\w+', which has 2 — discover"):
        shrink(model, [Choice(group, np.array([0, 1]))])


def test_new_weights_that_do_not_fit(graph: Parse) -> None:
    model = graph(GRAPHS["plain"])
    (group,) = discover(model).groups
    with pytest.raises(
        InputError, match=r"new weight 'down.weight' .* has shape \[2, 4\], the model's has \[6, 4\]"
    ):
        shrink(model, [Choice(group, np.array([0, 1]), {"down.weight": np.ones((2, 4))})])
    broken = np.full((6, 4), np.inf)
    with pytest.raises(InputError, match=r"new weight 'down.weight' holds NaN or infinity"):
        shrink(model, [Choice(group, np.array([0, 1]), {"down.weight": broken})])
