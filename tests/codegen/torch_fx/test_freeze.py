"""Modules for inputs of one shape: what depends on shapes and weights alone is computed once."""

import onnx_ir as ir
import torch
from planish.codegen.torch_fx import INPUTS_KEY, OPS, lower
from planish.codegen.torch_fx.freeze import freeze

TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
agraph (float[batch, tokens, 8] x, int64[1] start) => (float[batch, tokens, 2, 4] y, float[tokens] at)
<int64[2] side = {8, 8}, int64[2] heads = {2, 4}, float[1] one = {1.0}, int64 zero = {0}, int64 step = {1}>
{
    flat = ConstantOfShape <value = float[1] {0.5}> (side)
    turned = Transpose <perm = [1, 0]> (flat)
    product = MatMul (x, turned)
    sizes = Shape <start = 0, end = 2> (x)
    wanted = Concat <axis = 0> (sizes, heads)
    y = Reshape (product, wanted)
    length = Shape <start = 1, end = 2> (x)
    count = Squeeze (length)
    counted = Range (zero, count, step)
    shifted = Add (counted, start)
    floats = Cast <to = 1> (shifted)
    at = Mul (floats, one)
}
"""


def module():
    return lower(ir.from_onnx_text(TEXT))


def given(seed=0):
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "start": torch.tensor([seed])}


def functions(lowered):
    return [node.target.__name__ for node in lowered.graph.nodes if node.op == "call_function"]


def test_what_is_left():
    whole = module()
    frozen, first = freeze(whole, given(), OPS)
    assert functions(frozen) == ["matmul", "reshape", "add", "cast", "mul"]
    (reshape,) = (node for node in frozen.graph.nodes if getattr(node.target, "__name__", "") == "reshape")
    assert reshape.args[1] == [2, 5, 2, 4]
    assert frozen.meta[INPUTS_KEY] == whole.meta[INPUTS_KEY]
    for seed in (0, 3):
        expected = whole(**given(seed))
        found = frozen(**given(seed))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(first["y"], whole(**given())["y"])


def test_large_results_stay_computed(monkeypatch):
    monkeypatch.setattr("planish.codegen.torch_fx.freeze._MOST_NUMBERS", 63)
    whole = module()
    frozen, _ = freeze(whole, given(), OPS)
    expected = ["constant_of_shape", "transpose", "matmul", "reshape", "add", "cast", "mul"]
    assert functions(frozen) == expected
    assert torch.equal(frozen(**given(1))["y"], whole(**given(1))["y"])
