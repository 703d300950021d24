"""Which channels go together, in graphs small enough to tell by hand; and why others must stay."""

from __future__ import annotations

from collections.abc import Callable

import networkx
import numpy as np
import onnx_ir as ir
import pytest
from planish.ir.errors import InputError
from planish.ir.structure import ChannelGroup, Structure, discover

Parse = Callable[[str], ir.Model]


def members(group: ChannelGroup) -> dict[tuple[str, int], tuple[str, list[list[int]]]]:
    return {(m.tensor, m.axis): (m.role, m.indices.tolist()) for m in group.members}


def single(width: int, start: int = 0) -> list[list[int]]:
    return [[start + index] for index in range(width)]


MLP = """
mlp (double[b, s, 4] x) => (double[b, s, 4] y)
<double[4, 6] mlp__up__weight, double[6] mlp__up__bias, double[6, 4] mlp__down__weight>
{
  u = MatMul(x, mlp__up__weight)  ub = Add(u, mlp__up__bias)  r = Relu(ub)
  d = MatMul(r, mlp__down__weight)  y = Add(x, d)
}
"""


def test_channels_between_two_linears(graph: Parse) -> None:
    structure = discover(graph(MLP))
    (group,) = structure.groups
    assert (group.name, group.kind, group.structures) == ("mlp", "ffn", 6)
    assert members(group) == {
        ("mlp.up.weight", 1): ("producer", single(6)),
        ("mlp.up.bias", 0): ("passenger", single(6)),
        ("mlp.down.weight", 0): ("consumer", single(6)),
    }
    assert group.nodes == ("u", "ub", "r", "d")
    assert [m.tensor for m in group.producers] == ["mlp.up.weight"]
    assert [m.tensor for m in group.consumers] == ["mlp.down.weight"]
    (module,) = structure.modules
    assert (module.name, module.kind, module.groups) == ("mlp", "ffn", ("mlp",))
    assert (module.input, module.branch, module.output) == ("x", "d", "y")
    assert module.nodes == ("u", "ub", "r", "d", "y")


def test_graph_of_dimensions(graph: Parse) -> None:
    dimensions = discover(graph(MLP)).graph
    assert isinstance(dimensions, networkx.Graph)
    assert dimensions.nodes["r", 2]["size"] == 6
    inner = networkx.node_connected_component(dimensions, ("r", 2))
    assert inner == {
        *(("mlp.up.weight", 1), ("mlp.up.bias", 0), ("mlp.down.weight", 0)),
        *(("u", 2), ("ub", 2), ("r", 2)),
    }


GATED = """
gated (double[b, s, 4] x) => (double[b, s, 4] y)
<double[4, 12] gate_up__weight, double[6, 4] down__weight, int64[2] halves = {6, 6}>
{
  gu = MatMul(x, gate_up__weight)  g, u = Split <axis = -1> (gu, halves)  s = Sigmoid(g)
  a = Mul(g, s)  h = Mul(a, u)  y = MatMul(h, down__weight)
}
"""


def test_merged_gate_and_up(graph: Parse) -> None:
    (group,) = discover(graph(GATED)).groups
    assert members(group)["gate_up.weight", 1] == ("producer", [[i, i + 6] for i in range(6)])
    assert members(group)["down.weight", 0] == ("consumer", single(6))


ATTENTION = """
attention (double[b, s, 8] x) => (double[b, s, 8] y)
<double[8, 8] attn__q__weight, double[8] attn__q__bias, double[8, 4] attn__k__weight,
 double[8, 4] attn__v__weight, double[8, 8] attn__o__weight,
 int64[4] qs = {0, 0, 4, 2}, int64[4] ks = {0, 0, 2, 2}, int64[3] flat = {0, 0, 8}>
{
  qm = MatMul(x, attn__q__weight)  qb = Add(qm, attn__q__bias)
  qr = Reshape(qb, qs)  qt = Transpose <perm = [0, 2, 1, 3]> (qr)
  km = MatMul(x, attn__k__weight)  kr = Reshape(km, ks)  kt = Transpose <perm = [0, 2, 1, 3]> (kr)
  vm = MatMul(x, attn__v__weight)  vr = Reshape(vm, ks)  vt = Transpose <perm = [0, 2, 1, 3]> (vr)
  a = Attention(qt, kt, vt)
  at = Transpose <perm = [0, 2, 1, 3]> (a)  ar = Reshape(at, flat)  om = MatMul(ar, attn__o__weight)
  y = Add(x, om)
}
"""


def test_key_value_head_goes_with_its_query_heads(graph: Parse) -> None:
    (group,) = discover(graph(ATTENTION)).groups
    assert (group.name, group.kind, group.structures) == ("attn", "attention", 2)
    two_heads, one_head = [[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 1], [2, 3]]
    assert members(group) == {
        ("attn.q.weight", 1): ("producer", two_heads),
        ("attn.q.bias", 0): ("passenger", two_heads),
        ("attn.k.weight", 1): ("producer", one_head),
        ("attn.v.weight", 1): ("producer", one_head),
        ("attn.o.weight", 0): ("consumer", two_heads),
    }


FLAT_ATTENTION = """
attention (double[b, s, 8] x, double[b, 2, p, 2] pk, double[b, 2, p, 2] pv)
  => (double[b, s, 8] y, double[b, 2, t, 2] nk, double[b, 2, t, 2] nv)
<double[8, 16] attn__qkv__weight, double[8, 8] attn__o__weight, int64[3] widths = {8, 4, 4}>
{
  m = MatMul(x, attn__qkv__weight)  q, k, v = Split <axis = -1> (m, widths)
  a, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 2> (q, k, v, , pk, pv)
  y = MatMul(a, attn__o__weight)
}
"""


def test_heads_of_a_merged_projection_in_the_flat_layout(graph: Parse) -> None:
    (group,) = discover(graph(FLAT_ATTENTION)).groups
    assert members(group) == {
        ("attn.qkv.weight", 1): (
            "producer",
            [[0, 1, 2, 3, 8, 9, 12, 13], [4, 5, 6, 7, 10, 11, 14, 15]],
        ),
        ("attn.o.weight", 0): ("consumer", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    }


UNBOUND_ATTENTION = """
attention (double[b, s, 8] x) => (double[b, s, 8] y)
<double[8, 24] attn__qkv__weight, double[8, 8] attn__o__weight, int64[5] parts = {0, 0, 3, 4, 2},
 int64[3] flat = {0, 0, 8}, int64 zero = {0}, int64 one = {1}, int64 two = {2}>
{
  m = MatMul(x, attn__qkv__weight)  r = Reshape(m, parts)  t = Transpose <perm = [2, 0, 3, 1, 4]> (r)
  q = Gather(t, zero)  k = Gather(t, one)  v = Gather(t, two)
  a = Attention(q, k, v)  at = Transpose <perm = [0, 2, 1, 3]> (a)  ar = Reshape(at, flat)
  y = MatMul(ar, attn__o__weight)
}
"""


def test_heads_lie_behind_an_axis_that_is_taken_apart(graph: Parse) -> None:
    (group,) = discover(graph(UNBOUND_ATTENTION)).groups
    expected = np.arange(24).reshape(3, 4, 2).transpose(1, 0, 2).reshape(4, 6)
    assert members(group)["attn.qkv.weight", 1] == ("producer", expected.tolist())


CONVOLUTIONS = """
convolutions (double[b, 3, 8, 8] x) => (double[b, 5] y)
<double[4, 3, 3, 3] a__weight,
 double[4] bn__weight, double[4] bn__bias, double[4] bn__mean, double[4] bn__var,
 double[4, 1, 3, 3] b__weight, double[4] b__bias, double[6, 4, 1, 1] c__weight, double[216, 5] d__weight>
{
  a = Conv(x, a__weight)  n = BatchNormalization(a, bn__weight, bn__bias, bn__mean, bn__var)  r = Relu(n)
  dw = Conv <group = 4, pads = [1, 1, 1, 1]> (r, b__weight, b__bias)
  c = Conv(dw, c__weight)  f = Flatten(c)  y = MatMul(f, d__weight)
}
"""


def test_channels_through_batch_norm_depthwise_and_flatten(graph: Parse) -> None:
    first, second = discover(graph(CONVOLUTIONS)).groups
    assert (first.name, first.kind, first.structures) == ("a", "convolution", 4)
    assert {key: role for key, (role, _) in members(first).items()} == {
        ("a.weight", 0): "producer",
        ("bn.weight", 0): "passenger",
        ("bn.bias", 0): "passenger",
        ("bn.mean", 0): "passenger",
        ("bn.var", 0): "passenger",
        ("b.weight", 0): "passenger",
        ("b.bias", 0): "passenger",
        ("c.weight", 1): "consumer",
    }
    # 6 × 6 positions of a channel follow one another after Flatten.
    flat = np.arange(216).reshape(6, 36).tolist()
    assert members(second) == {("c.weight", 0): ("producer", single(6)), ("d.weight", 0): ("consumer", flat)}


GROUPED = """
grouped (double[b, 3, 8, 8] x) => (double[b, 5, 8, 8] y)
<double[6, 3, 1, 1] a__weight, double[9, 2, 1, 1] b__weight, double[5, 9, 1, 1] c__weight>
{ a = Conv(x, a__weight)  g = Conv <group = 3> (a, b__weight)  y = Conv(g, c__weight) }
"""


def test_a_structure_of_a_grouped_convolution_is_a_whole_group(graph: Parse) -> None:
    (group,) = discover(graph(GROUPED)).groups
    assert members(group) == {
        ("a.weight", 0): ("producer", [[0, 1], [2, 3], [4, 5]]),
        ("b.weight", 0): ("passenger", [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ("c.weight", 1): ("consumer", [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
    }


DENSE = """
dense (double[b, 3, 4, 4] x) => (double[b, 5, 4, 4] y)
<double[4, 3, 1, 1] a__weight, double[2, 4, 1, 1] b__weight, double[5, 6, 1, 1] c__weight>
{ a = Conv(x, a__weight)  b0 = Conv(a, b__weight)  ab = Concat <axis = 1> (a, b0)  y = Conv(ab, c__weight) }
"""


def test_concatenated_channels_are_groups_of_their_own(graph: Parse) -> None:
    first, second = discover(graph(DENSE)).groups
    assert members(first) == {
        ("a.weight", 0): ("producer", single(4)),
        ("b.weight", 1): ("consumer", single(4)),
        ("c.weight", 1): ("consumer", single(4)),
    }
    assert members(second) == {
        ("b.weight", 0): ("producer", single(2)),
        ("c.weight", 1): ("consumer", single(2, start=4)),
    }


STREAM = """
stream (int64[b, s] ids) => (double[b, s, 9] y)
<double[9, 4] embed__weight, double[4] n1__weight, double[4, 6] up__weight, double[6, 4] down__weight,
 double[4] n2__weight, double[4, 9] head__weight>
{
  x = Gather(embed__weight, ids)  h = NORM <axis = -1> (x, n1__weight)
  u = MatMul(h, up__weight)  r = Relu(u)  d = MatMul(r, down__weight)  x2 = Add(x, d)
  f = NORM <axis = -1> (x2, n2__weight)  y = MatMul(f, head__weight)
}
"""


def test_width_of_the_residual_stream(graph: Parse) -> None:
    ffn, hidden = discover(graph(STREAM.replace("NORM", "RMSNormalization"))).groups
    assert (ffn.kind, ffn.structures) == ("ffn", 6)
    assert (hidden.name, hidden.kind, hidden.structures) == ("hidden", "hidden", 4)
    assert {key: role for key, (role, _) in members(hidden).items()} == {
        ("embed.weight", 1): "producer",
        ("n1.weight", 0): "passenger",
        ("up.weight", 0): "consumer",
        ("down.weight", 1): "producer",
        ("n2.weight", 0): "passenger",
        ("head.weight", 0): "consumer",
    }


def test_layer_norm_holds_the_stream(graph: Parse) -> None:
    structure = discover(graph(STREAM.replace("NORM", "LayerNormalization")))
    assert [group.kind for group in structure.groups] == ["ffn"]
    (held,) = structure.unprunable
    assert held.name == "hidden"
    assert held.reason == "LayerNormalization 'h' subtracts the mean over all its channels"
    # The norm is in the branch and goes with it.
    assert structure.modules[0].nodes == ("h", "u", "r", "d", "x2")


def test_rms_norm_outside_the_stream_holds(graph: Parse) -> None:
    text = MLP.replace("r = Relu(ub)", "r = RMSNormalization <axis = -1> (ub, mlp__up__bias)")
    structure = discover(graph(text))
    assert not structure.groups
    assert "root mean square over all its channels" in structure.unprunable[0].reason


HELD = {
    "output": ("r = Relu(ub)", "r = Relu(ub)  z = Identity(r)", "'z' is an output of the model"),
    "unknown op": ("r = Relu(ub)", "r = CumSum(ub, axis)", "no rule for op CumSum"),
    "softmax": ("r = Relu(ub)", "r = Softmax <axis = -1> (ub)", "Softmax 'r' sums over it"),
    "constant node": (
        "r = Relu(ub)",
        "c = Constant <value = double[6] {1, 2, 3, 4, 5, 6}> ()  r = Mul(ub, c)",
        "no rule for op Constant",
    ),
    "mean": (
        "r = Relu(ub)",
        "m = ReduceMean <keepdims = 1> (ub, axis)  r = Sub(ub, m)",
        "ReduceMean 'm' reduces it",
    ),
}


@pytest.mark.parametrize("why", sorted(HELD))
def test_channels_that_must_stay_say_why(graph: Parse, why: str) -> None:
    old, new, reason = HELD[why]
    text = MLP.replace(old, new).replace(
        "double[6] mlp__up__bias", "double[6] mlp__up__bias, int64[1] axis = {2}"
    )
    if why == "output":
        text = text.replace("double[b, s, 4] y)", "double[b, s, 4] y, double[b, s, 6] z)")
    structure = discover(graph(text))
    assert not structure.groups
    stream = ("hidden", "'x' is an input of the model")
    # Behind an op without a rule nothing is known, so that only the producer can be named.
    name = "mlp.up" if why == "unknown op" else "mlp"
    assert [(held.name, held.reason) for held in structure.unprunable] == [(name, reason), stream]
    assert f"{name} stays: {reason}" in str(structure)


def test_a_single_linear_says_why(graph: Parse) -> None:
    structure = discover(
        graph(
            "one (double[b, 4] x) => (double[b, 3] y) <double[4, 3] fc__weight> { y = MatMul(x, fc__weight) }"
        )
    )
    assert not structure.groups
    text = str(structure)
    assert "nothing can be pruned" in text
    assert "fc stays: 'x' is an input of the model" in text
    assert "fc stays: 'y' is an output of the model" in text


def test_one_index_of_a_cut_holds_its_neighbours(graph: Parse) -> None:
    text = """
    cut (double[b, 4] x) => (double[b, 3] y)
    <double[4, 6] a__weight, double[6, 3] b__weight, int64[1] o = {0}, int64[1] i = {1}>
    { a = MatMul(x, a__weight)  f = Slice(a, o, i, i)  s = Mul(a, f)  y = MatMul(s, b__weight) }
    """
    structure = discover(graph(text))
    assert not structure.groups
    assert structure.unprunable[0].reason == "Slice 'f' takes single indices of it"


def test_tied_weight_is_in_both_roles(graph: Parse) -> None:
    text = STREAM.replace("NORM", "RMSNormalization").replace(", double[4, 9] head__weight", "")
    text = text.replace("y = MatMul(f, head__weight)", "t = Transpose(embed__weight)  y = MatMul(f, t)")
    hidden = discover(graph(text)).groups[-1]
    tied = [(m.axis, m.role, m.indices.tolist()) for m in hidden.members if m.tensor == "embed.weight"]
    assert tied == [(1, "producer", single(4)), (1, "consumer", single(4))]


def test_structure_as_text(graph: Parse) -> None:
    text = str(discover(graph(ATTENTION)))
    row = next(line for line in text.splitlines() if "attn.o.weight" in line)
    assert row.split() == ["attn.o.weight", "0", "consumer", "0-3", "|", "4-7"]
    assert "hidden stays: 'x' is an input of the model" in text


def test_looking_up_by_name(graph: Parse) -> None:
    structure = discover(graph(MLP))
    assert structure.group("mlp") is structure.groups[0]
    assert structure.module("mlp") is structure.modules[0]
    with pytest.raises(InputError, match=r"no channel group is named 'mpl' — its groups are mlp"):
        structure.group("mpl")
    with pytest.raises(InputError, match="no residual module is named 'a' — the model has no modules"):
        Structure((), (), (), structure.graph).module("a")


def test_a_bias_per_head_goes_with_the_heads(graph: Parse) -> None:
    """Relative positions, looked up in a table that has a column for each query head."""
    text = ATTENTION.replace("attention (", "attention (int64[s, s] distances, ")
    text = text.replace("<double[8, 8] attn__q", "<double[5, 4] attn__bias__weight, double[8, 8] attn__q")
    text = text.replace(
        "a = Attention(qt, kt, vt)",
        "rows = Gather(attn__bias__weight, distances)  byhead = Transpose <perm = [2, 0, 1]> (rows) "
        "axis = Constant <value_ints = [0]> ()  bias = Unsqueeze(byhead, axis)  "
        "a = Attention(qt, kt, vt, bias)",
    )
    (group,) = discover(graph(text)).groups
    assert members(group)["attn.bias.weight", 1] == ("producer", [[0, 1], [2, 3]])


def test_a_mask_whose_heads_are_unknown_holds_them(graph: Parse) -> None:
    text = ATTENTION.replace("attention (", "attention (double[b, h, s, s] mask, ")
    structure = discover(graph(text.replace("Attention(qt, kt, vt)", "Attention(qt, kt, vt, mask)")))
    assert not structure.groups
    assert structure.unprunable[0].reason == "the heads of 'mask' are not known"


def test_transposed_convolution_is_refused(graph: Parse) -> None:
    structure = discover(
        graph(
            """
            up (double[b, 3, 4, 4] x) => (double[b, 5, 5, 5] y)
            <double[4, 3, 1, 1] a__weight, double[4, 5, 2, 2] b__weight>
            { a = Conv(x, a__weight)  y = ConvTranspose(a, b__weight) }"""
        )
    )
    assert not structure.groups
    assert [(held.name, held.reason) for held in structure.unprunable] == [
        ("a", "no rule for op ConvTranspose")
    ]


def test_what_a_subgraph_reads_stays(graph: Parse) -> None:
    text = """
    branch (double[b, s, 4] x, bool c) => (double[b, s, 4] y)
    <double[4, 6] mlp__up__weight, double[6, 4] mlp__down__weight>
    { ub = MatMul(x, mlp__up__weight)
      r = If (c) <then_branch = then () => (double[b, s, 6] t) { t = Relu(ub) },
                  else_branch = otherwise () => (double[b, s, 6] e) { e = Tanh(ub) }>
      y = MatMul(r, mlp__down__weight) }
    """
    structure = discover(graph(text))
    assert not structure.groups
    assert [(held.name, held.reason) for held in structure.unprunable] == [
        ("mlp.up", "the body of If 'r' reads it")
    ]
