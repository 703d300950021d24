"""Dropping branches of the residual stream: twins of what is expected, and what must then disappear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from planish.ir import clone, diff_models, verify
from planish.ir.errors import InputError
from planish.ir.structure import Choice, discover, drop, shrink

Parse = Callable[[str], ir.Model]
Anything = Callable[..., Any]

WEIGHTS = """
<double[4] n1__weight, double[4, 6] a__up__weight, double[6, 4] a__down__weight,
 double[4] n2__weight, double[4, 6] b__up__weight, double[6, 4] b__down__weight>
"""
FIRST = """
  h1 = RMSNormalization <axis = -1> (x, n1__weight)  u1 = MatMul(h1, a__up__weight)  r1 = Relu(u1)
  d1 = MatMul(r1, a__down__weight)  x1 = Add(x, d1)
"""
SECOND = """
  h2 = RMSNormalization <axis = -1> (STREAM, n2__weight)  u2 = MatMul(h2, b__up__weight)  r2 = Relu(u2)
  d2 = MatMul(r2, b__down__weight)  x2 = Add(d2, STREAM)
"""
HEAD = "g (double[b, s, 4] x) => (double[b, s, 4] y)"
BEFORE = f"{HEAD} {WEIGHTS} {{ {FIRST} {SECOND.replace('STREAM', 'x1')} y = Relu(x2) }}"

SECOND_WEIGHTS = "<double[4] n2__weight, double[4, 6] b__up__weight, double[6, 4] b__down__weight>"
FIRST_WEIGHTS = "<double[4] n1__weight, double[4, 6] a__up__weight, double[6, 4] a__down__weight>"
EXPECTED = {
    ("a",): f"{HEAD} {SECOND_WEIGHTS} {{ {SECOND.replace('STREAM', 'x')} y = Relu(x2) }}",
    ("b",): f"{HEAD} {FIRST_WEIGHTS} {{ {FIRST} y = Relu(x1) }}",
    ("a", "b"): f"{HEAD} {{ y = Relu(x) }}",
}


@pytest.mark.parametrize("names", sorted(EXPECTED), ids="+".join)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_branch_becomes_the_identity(graph: Parse, names: tuple[str, ...], one_by_one: bool) -> None:
    model, expected = graph(BEFORE), graph(EXPECTED[names])
    modules = [discover(model).module(name) for name in names]
    for part in [[module] for module in modules] if one_by_one else [modules]:
        drop(model, part)
        verify(model)
    for name, value in expected.graph.initializers.items():
        value.const_value = model.graph.initializers[name].const_value
    assert not diff_models(expected, model)


def test_output_of_the_model_keeps_its_name(graph: Parse, run: Anything) -> None:
    text = f"{HEAD} {FIRST_WEIGHTS} {{ {FIRST.replace('x1 =', 'y =')} }}"
    model = graph(text)
    drop(model, discover(model).modules)
    verify(model)
    x = np.random.default_rng(0).standard_normal((2, 3, 4))
    np.testing.assert_array_equal(run(model, {"x": x})["y"], x)


def test_what_others_read_stays(graph: Parse) -> None:
    """The second branch reads the first one's norm: it outlives the first branch."""
    second = SECOND.replace("h2 = RMSNormalization <axis = -1> (STREAM, n2__weight)", "")
    second = second.replace("STREAM", "x1").replace("h2", "h1")
    model = graph(f"{HEAD} {WEIGHTS} {{ {FIRST} {second} y = Relu(x2) }}")
    module = discover(model).module("a")
    assert module.nodes == ("u1", "r1", "d1", "x1")
    drop(model, [module])
    assert [node.outputs[0].name for node in model.graph] == ["h1", "u2", "r2", "d2", "x2", "y"]
    assert set(model.graph.initializers) == {"n1.weight", "b.up.weight", "b.down.weight"}


def test_post_norm_stays(graph: Parse) -> None:
    model = graph(
        f"""{HEAD} <double[4, 6] a__up__weight, double[6, 4] a__down__weight, double[4] n__weight>
        {{ u = MatMul(x, a__up__weight)  r = Relu(u)  d = MatMul(r, a__down__weight)  x1 = Add(d, x)
           y = LayerNormalization <axis = -1> (x1, n__weight) }}"""
    )
    drop(model, [discover(model).module("a")])
    (node,) = model.graph
    assert (node.op_type, node.inputs[0]) == ("LayerNormalization", model.graph.inputs[0])


DECODER_LAYER = """
  hI = RMSNormalization <axis = -1> (xI, nI__weight)
  qI = MatMul(hI, lI__q__weight)  qrI = Reshape(qI, qs)  qtI = Transpose <perm = [0, 2, 1, 3]> (qrI)
  kI = MatMul(hI, lI__k__weight)  krI = Reshape(kI, ks)  ktI = Transpose <perm = [0, 2, 1, 3]> (krI)
  vI = MatMul(hI, lI__v__weight)  vrI = Reshape(vI, ks)  vtI = Transpose <perm = [0, 2, 1, 3]> (vrI)
  aI, nkI, nvI = Attention(qtI, ktI, vtI, mask, pkI, pvI)
  atI = Transpose <perm = [0, 2, 1, 3]> (aI)  arI = Reshape(atI, flat)  oI = MatMul(arI, lI__o__weight)
  xJ = Add(xI, oI)
"""


def decoder(graph: Parse) -> ir.Model:
    """Two attentions; the mask, of the length of the past of the first one, is asked of its cache."""
    caches = [f"double[b, 2, p, 2] p{kind}{i}" for i in range(2) for kind in "kv"]
    presents = [f"double[b, 2, t, 2] n{kind}{i}" for i in range(2) for kind in "kv"]
    weights = [
        f"double[8] n{i}__weight, double[8, 8] l{i}__q__weight, double[8, 4] l{i}__k__weight, "
        f"double[8, 4] l{i}__v__weight, double[8, 8] l{i}__o__weight"
        for i in range(2)
    ]
    layers = [DECODER_LAYER.replace("I", str(i)).replace("J", str(i + 1)) for i in range(2)]
    return graph(
        f"""
        g (double[b, s, 8] x0, {", ".join(caches)}) => (double[b, s, 8] y, {", ".join(presents)})
        <{", ".join(weights)}, int64[4] qs = {{0, 0, 4, 2}}, int64[4] ks = {{0, 0, 2, 2}},
         int64[3] flat = {{0, 0, 8}}, double half = {{0.5}}>
        {{ past = Shape <start = 2, end = 3> (pk0)  new = Shape <start = 1, end = 2> (x0)
           total = Add(past, new)  shape = Concat <axis = 0> (new, total)  mask = Expand(half, shape)
           {" ".join(layers)}  y = Relu(x2) }}"""
    )


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    sizes = {"b": 2, "s": 3, "p": 4}
    return {
        value.name or "": rng.standard_normal(
            [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape or ()]
        )
        for value in model.graph.inputs
    }


def names(values: list[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


def test_caches_of_a_dropped_attention_disappear(graph: Parse, run: Anything) -> None:
    model = decoder(graph)
    fed = feeds(model)
    first, second = discover(model).modules
    dropped = clone(model)
    drop(dropped, [first])
    verify(dropped)
    assert names(dropped.graph.inputs) == ["x0", "pk1", "pv1"]
    assert names(dropped.graph.outputs) == ["y", "nk1", "nv1"]
    # The length of the past is asked of the cache that is left.
    (shape,) = (node for node in dropped.graph if node.outputs[0].name == "past")
    assert shape.inputs[0] is dropped.graph.inputs[1]
    # As if the first attention had nothing to add.
    silent = clone(model)
    weight = silent.graph.initializers["l0.o.weight"]
    weight.const_value = ir.tensor(np.zeros((8, 8)), name="l0.o.weight")
    np.testing.assert_array_equal(run(dropped, fed)["y"], run(silent, fed)["y"])
    np.testing.assert_array_equal(run(dropped, fed)["nk1"], run(silent, fed)["nk1"])

    drop(dropped, [second])
    assert names(dropped.graph.inputs) == ["x0"]
    assert names(dropped.graph.outputs) == ["y"]
    assert [node.op_type for node in dropped.graph] == ["Relu"]
    assert not dropped.graph.initializers


def test_both_attentions_at_once(graph: Parse) -> None:
    model = decoder(graph)
    drop(model, discover(model).modules)
    verify(model)
    assert names(model.graph.inputs) == ["x0"]
    assert names(model.graph.outputs) == ["y"]


def test_a_cache_that_is_needed_otherwise(graph: Parse) -> None:
    model = decoder(graph)
    node = ir.node("Size", [model.graph.inputs[1]])
    cast = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.INT64})
    cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = (
        "size",
        ir.DataType.INT64,
        ir.Shape([]),
    )
    node.outputs[0].name = "elements"
    model.graph.extend([node, cast])
    model.graph.outputs.append(cast.outputs[0])
    before = str(model)
    with pytest.raises(
        InputError, match=r"drop: Size 'elements' reads 'pk0', the cache of a dropped attention"
    ):
        drop(model, discover(model).modules[:1])
    assert str(model) == before


def test_dropping_twice(graph: Parse) -> None:
    model = graph(BEFORE)
    module = discover(model).module("a")
    drop(model, [module])
    with pytest.raises(InputError, match="drop: no Add of 'd1' makes 'x1' of module 'a' — discover"):
        drop(model, [module])


def test_shrink_and_drop_in_any_order(graph: Parse, run: Anything) -> None:
    """Everything is told by name, so that a structure holds for what has been shrunk or dropped from."""
    model = graph(BEFORE)
    structure = discover(model)
    choices = [Choice(group, np.array([1, 4])) for group in structure.groups if group.kind == "ffn"]
    one, other = clone(model), clone(model)
    shrink(one, choices)
    drop(one, [structure.module("a")])
    drop(other, [structure.module("a")])
    shrink(other, choices)
    assert not diff_models(one, other)
    assert one.graph.initializers["b.up.weight"].shape == (4, 2)


NESTED = f"""
{HEAD}
<double[4, 4] outer__a__weight, double[4, 6] outer__in__up__weight, double[6, 4] outer__in__down__weight>
{{ a = MatMul(x, outer__a__weight)  u = MatMul(a, outer__in__up__weight)  r = Relu(u)
   d = MatMul(r, outer__in__down__weight)  e = Add(a, d)  x1 = Add(x, e)  y = Relu(x1) }}
"""


@pytest.mark.parametrize("order", ["inner first", "outer first", "together"])
def test_branch_in_a_branch(graph: Parse, order: str) -> None:
    model = graph(NESTED)
    inner, outer = discover(model).modules
    assert (inner.output, outer.output) == ("e", "x1")
    if order == "together":
        drop(model, [inner, outer])
    elif order == "outer first":
        drop(model, [outer])
    else:
        drop(model, [inner])
        assert [node.outputs[0].name for node in model.graph] == ["a", "x1", "y"]
        drop(model, [outer])
    verify(model)
    assert [node.op_type for node in model.graph] == ["Relu"]
