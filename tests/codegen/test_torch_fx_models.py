"""Whole graphs as torch.fx modules: agreement with onnxruntime, precision, gradients, names, memory."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from planish.codegen import get_target
from planish.codegen.torch_fx import NODE_KEY, OPS, VALUE_KEY, Lowering, lower, run
from planish.ir import clone, ops
from planish.ir.errors import InputError, TargetError
from planish.ir.trace import trace
from planish.passes.canonicalize import Canonicalize
from planish.passes.fuse import Fuse
from planish.passes.infrastructure.base import PassContext
from planish.passes.quantize import Quantize
from planish.runtime.reference import run_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

MLP = """<ir_version: 11, opset_import: ["": 23]>
    net (float[batch, 4] "x.in") => (float[batch, 2] "y.out")
    <float[4, 3] "l0.weight" = {1,2,3,4,5,6,7,8,9,-1,-2,-3}, float[3] "l0.bias" = {0.5,-1,2},
     float[3, 2] "l1.weight" = {1,-1,2,1,0,3}>
    { m = MatMul("x.in", "l0.weight")  h = Add(m, "l0.bias")
      a = Tanh(h)  "y.out" = MatMul(a, "l1.weight") }"""
X = {"x.in": np.array([[0.1, -0.2, 0.3, 0.4], [0.5, 0.0, -0.6, 0.7]], np.float32)}


def parse(text: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(text))
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/node"
    return model


def test_outputs_are_named_and_arguments_are_identifiers() -> None:
    module = lower(parse(MLP))
    expected = run_model(parse(MLP), X)["y.out"]
    by_name = run(module, X)
    by_argument = module(x_in=torch.from_numpy(X["x.in"]))
    assert list(by_name) == list(by_argument) == ["y.out"]
    np.testing.assert_allclose(by_name["y.out"].numpy(), expected, rtol=1e-5)  # float32 sums of 4 terms
    assert torch.equal(by_name["y.out"], by_argument["y.out"])


def test_nodes_can_be_traced_back_and_weights_keep_their_names() -> None:
    module = lower(parse(MLP))
    assert set(module.state_dict()) == {"l0.weight", "l0.bias", "l1.weight"}
    nodes = {node.meta[NODE_KEY]: node for node in module.graph.nodes if NODE_KEY in node.meta}
    assert list(nodes) == ["m/node", "h/node", "a/node", "y.out/node"]
    assert nodes["a/node"].target is torch.tanh
    assert nodes["a/node"].meta[VALUE_KEY] == "a"
    assert "torch.tanh(h_node)" in module.code
    twin = copy.deepcopy(module)
    assert torch.equal(run(twin, X)["y.out"], run(module, X)["y.out"])


def test_names_that_python_cannot_write_down_are_changed() -> None:
    """What torch writes into the code of the module is text in quotes."""
    model = parse(MLP)
    model.graph.initializers["l0.weight"].name = 'l0.a"b/weight'
    module = lower(model)
    assert set(module.state_dict()) == {"l0.a_b/weight", "l0.bias", "l1.weight"}
    expected = run_model(parse(MLP), X)["y.out"]
    np.testing.assert_allclose(run(module, X)["y.out"].numpy(), expected, rtol=1e-5)  # float32 sums


def test_weights_share_memory_unless_they_are_trainable_or_converted() -> None:
    model = parse(MLP)
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    array.setflags(write=False)
    model.graph.initializers["l0.weight"].const_value = ir.Tensor(array, name="l0.weight")
    module = lower(model, trainable=["l1.weight"])
    state = module.state_dict()
    assert state["l0.weight"].data_ptr() == array.ctypes.data
    assert [name for name, _ in module.named_parameters()] == ["l1.weight"]
    with torch.no_grad():
        module.l1.weight.zero_()
    assert model.graph.initializers["l1.weight"].const_value.numpy().any()
    with pytest.raises(InputError, match=r"trainable: 'l2\.weight'"):
        lower(model, trainable=["l2.weight"])


def test_float64_converts_weights_constants_inputs_and_casts() -> None:
    model = parse(
        """<ir_version: 11, opset_import: ["": 23]> net (float[2] x, int64[2] n) => (float[2] y, int64[2] m)
        <float[1] tenth = {0.1}>
        { third = Constant <value = float {0.3333333432674408}> ()
          f = Cast <to = 1> (n)  shape = Shape(x)  one = ConstantOfShape <value = float[1] {1.0}> (shape)
          a = Mul(x, tenth)  b = Add(a, third)  c = Add(b, one)  y = Add(c, f)  m = Cast <to = 7> (y) }"""
    )
    feeds = {"x": np.array([0.3, 0.7], np.float32), "n": np.array([3, 70_000_001])}
    found = run(lower(model, dtype=torch.float64), feeds)
    x, tenth, third = (
        feeds["x"].astype(np.float64),
        np.float64(np.float32(0.1)),
        np.float64(np.float32(1 / 3)),
    )
    assert found["y"].dtype == torch.float64
    # Exact: the same float64 operations in the same order; float32 would not hold 70000001.
    np.testing.assert_array_equal(found["y"].numpy(), x * tenth + third + 1.0 + feeds["n"])
    assert found["m"].dtype == torch.int64


def test_gradients_reach_weights_and_inputs() -> None:
    names = ["l0.weight", "l0.bias", "l1.weight"]
    module = lower(parse(MLP), dtype=torch.float64, trainable=names)
    x = torch.from_numpy(X["x.in"]).double().requires_grad_()
    run(module, {"x.in": x})["y.out"].square().sum().backward()
    parameters = dict(module.named_parameters())
    w0, b0, w1 = (parameters[name] for name in names)
    hidden = torch.tanh(x @ w0 + b0)
    expected = torch.autograd.grad((hidden @ w1).square().sum(), [w0, b0, w1, x])
    for found, reference in zip([w0.grad, b0.grad, w1.grad, x.grad], expected, strict=True):
        torch.testing.assert_close(found, reference)


def test_entries_given_take_precedence_and_keep_functions_whole() -> None:
    model = parse(MLP)
    replaced = lower(model, ops={("", "Tanh"): Lowering(torch.sin)})
    weights = (model.graph.initializers[name] for name in ("l0.weight", "l0.bias", "l1.weight"))
    w0, b0, w1 = (value.const_value.numpy() for value in weights)
    expected = np.sin(X["x.in"] @ w0 + b0) @ w1
    np.testing.assert_allclose(run(replaced, X)["y.out"].numpy(), expected, rtol=1e-5, atol=1e-5)
    quantized = quantize(model, "W8A16")
    key = (ops.DOMAIN, "QuantizedLinear")
    whole = lower(quantized, ops={key: Lowering(first_product)})
    assert [node.target for node in whole.graph.nodes].count(first_product) == 2
    assert key not in OPS
    assert all(node.target is not first_product for node in lower(quantized).graph.nodes)


def first_product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *rest: object, **attributes: int
) -> torch.Tensor:
    return x @ (weight.to(x.dtype) * scale)


def quantize(model: ir.Model, scheme: str) -> ir.Model:
    copied = clone(model)
    Quantize(scheme=scheme).run(copied, PassContext(target=get_target("portable")))
    return copied


@pytest.mark.parametrize("scheme", ["W8A8", "W4A4", "W8A16", "W4A16", "NF4", "MXFP4", "NVFP4", "FP8"])
def test_quantised_layers_run_through_their_bodies(scheme: str) -> None:
    rng = np.random.default_rng(0)
    model = parse(
        '<ir_version: 11, opset_import: ["": 23]> net (float[b, 128] x) => (float[b, 96] y) '
        '<float[128, 96] "fc.weight" = {0}> { y = MatMul(x, "fc.weight") }'
    )
    weight = rng.standard_normal((128, 96)).astype(np.float32)
    model.graph.initializers["fc.weight"].const_value = ir.Tensor(weight, name="fc.weight")
    quantized = quantize(model, scheme)
    feeds = {"x": rng.standard_normal((5, 128)).astype(np.float32)}
    expected = run_model(quantized, feeds)["y"]
    found = run(lower(quantized), feeds)["y"].numpy()
    # The same integers and scales; 128 float32 products of the order of 1 in another order.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(found - feeds["x"] @ weight).max() > 1e-3  # and not the dense layer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{ y = Unique(x) }", r"node 'y/node' is Unique, which is not lowered — lowered are Abs, .*MatMul"),
        ("{ y = Softmax <axis = 1, flat = 1> (x) }", "node 'y/node' .Softmax.: .*flat"),
        ("{ y = Exp <base = 2> (x) }", "node 'y/node' .Exp.: takes no attribute 'base'"),
        ("{ z, y = MaxPool <kernel_shape = [1]> (x) }", "node 'z/node' .MaxPool.: output 1 .'y'. is used"),
        ("{ y = Cast <to = 23> (x) }", "node 'y/node' .Cast.: torch has no FLOAT4E2M1"),
    ],
)
def test_what_is_not_lowered_is_refused_by_name(text: str, message: str) -> None:
    head = '<ir_version: 11, opset_import: ["": 23]> net (float[2, 2, 2] x) => (float[m, n, k] y)'
    model = parse(f"{head} {text}")
    with pytest.raises(TargetError, match=message):
        lower(model)


def test_inputs_are_checked_by_name() -> None:
    module = lower(parse(MLP))
    with pytest.raises(InputError, match=r"input 'x.in' is missing"):
        run(module, {})
    with pytest.raises(InputError, match=r"input 'mask' is unknown; the graph's inputs are \['x.in'\]"):
        run(module, X | {"mask": X["x.in"]})


def test_awkward_names_find_a_place() -> None:
    model = parse(
        """<ir_version: 11, opset_import: ["": 23]>
        net (float[2] "a.b", float[2] "a_b", float[2] "lambda") => (float[2] y)
        <float[2] w = {1,2}, float[2] "w.x" = {3,4}, float[2] "code" = {5,6}, float[2] "/l.0/..w" = {7,8}>
        { p = Add("a.b", "a_b") q = Add(p, "lambda") r = Mul(q, w) s = Mul(r, "w.x") t = Add(s, "code")
          y = Add(t, "/l.0/..w") }"""
    )
    ones = np.ones(2, np.float32)
    found = run(lower(model), {"a.b": ones, "a_b": 2 * ones, "lambda": 3 * ones})["y"]
    assert found.tolist() == [6 * 1 * 3 + 5 + 7, 6 * 2 * 4 + 6 + 8]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", pytest.param("BERT", marks=pytest.mark.exhaustive)])
def test_architecture_agrees_with_onnxruntime(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    architecture = importlib.import_module("architectures").by_name(name)
    model = trace(architecture.module(), architecture.example, dynamic_shapes=architecture.dynamic_shapes)
    context = PassContext(target=get_target("portable"))
    Canonicalize().run(model, context)
    check_agreement(model)
    Fuse().run(model, context)
    check_agreement(model)


def check_agreement(model: ir.Model) -> None:
    single, double = lower(model), lower(model, dtype=torch.float64)
    for past in (0, 4):
        feeds = feeds_of(model, past)
        expected = run_model(model, feeds)
        with torch.no_grad():
            found, exact = run(single, feeds), run(double, feeds)
        for name, reference in expected.items():
            if not reference.size:
                continue
            largest = np.abs(reference).max()
            # Two layers of float32 sums of up to 64 terms: a few dozen units in the last place.
            assert np.abs(found[name].numpy() - reference).max() <= 5e-6 * largest
            assert np.abs(exact[name].numpy() - reference).max() <= 5e-6 * largest


def feeds_of(model: ir.Model, past: int) -> dict[str, np.ndarray]:
    """Token ids without padding after a past of ``past`` random states."""
    rng = np.random.default_rng(past)
    sizes = {"batch_size": 2, "sequence_length": 7}
    sizes |= {"past_sequence_length": past, "total_sequence_length": 7 + past}
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else sizes[dim.value] for dim in value.shape]
        if value.name == "attention_mask":
            feeds[value.name] = np.ones(shape, np.int64)
        elif value.name == "position_ids":
            feeds[value.name] = np.broadcast_to(np.arange(past, past + 7), shape).copy()
        elif value.dtype == ir.DataType.INT64:
            feeds[value.name] = rng.integers(3, 96, shape)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds
