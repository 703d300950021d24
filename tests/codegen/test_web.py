"""Looking up the nodes of a model in the operators of onnxruntime-web."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import planish
import pytest
from planish.codegen.web import web_support
from planish.codegen.web_operators import VERSION
from planish.ir.errors import TargetError


def graph(nodes: str, opset: int = 23) -> ir.Model:
    text = f"""<ir_version: 11, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g (float[2, 4] x) => (float[a, b] y) {{ {nodes} }}"""
    return ir.from_proto(onnx.parser.parse_model(text))


def test_an_op_counts_by_the_version_of_its_definition():
    """Transpose has definitions of opset 21 and 23, and the kernel for WebGPU is for 21."""
    nodes = "a = Transpose(x) b = Transpose(a) y = Relu(b)"
    new, old = (web_support(graph(nodes, opset), "webgpu") for opset in (23, 21))
    assert new.unsupported == {"Transpose-23": 2}
    assert not new.complete
    assert str(new) == (f"webgpu of onnxruntime-web {VERSION} has no kernel for 2 of 3 nodes: 2 Transpose-23")
    assert old.complete
    assert str(old) == f"webgpu of onnxruntime-web {VERSION} has kernels for all 3 nodes"
    assert web_support(graph(nodes), "wasm").complete


@pytest.mark.parametrize(
    ("op", "wasm", "webgpu"),
    [
        ("RMSNormalization(x, x)", True, False),
        ("HardSwish(x)", True, False),  # by its body, and of opset 22
        ("com.microsoft.FastGelu(x)", True, True),
        ("com.microsoft.MatMulBnb4(x, x, x)", True, False),
        ("com.microsoft.NotThere(x)", False, False),
        ("NotThere(x)", False, False),
        ("Constant<value_float: float = 1.0>()", True, True),
        ("Attention(x, x, x)", True, False),
    ],
)
def test_ops(op, wasm, webgpu):
    model = graph(f"y = {op}")
    assert web_support(model, "wasm").complete == wasm
    assert web_support(model, "webgpu").complete == webgpu


def test_functions_are_looked_into():
    text = """<ir_version: 11, opset_import: ["" : 23, "own" : 1]>
    g (float[2, 4] x) => (float[a, b] y) { a = own.twice(x) y = own.twice(a) }
    <domain: "own", opset_import: ["" : 23]> twice (x) => (y) { a = Transpose(x) y = Transpose(a) }"""
    found = web_support(ir.from_proto(onnx.parser.parse_model(text)), "webgpu")
    assert (found.nodes, found.unsupported) == (4, {"Transpose-23": 4})


def test_a_compiled_model_tells():
    model = graph("y = Relu(x)")
    compiled = planish.compile(model, target="portable", example_inputs={"x": np.zeros((2, 4), np.float32)})
    assert compiled.web_support("webgpu").complete
    with pytest.raises(TargetError, match="expected a provider of"):
        compiled.web_support("webnn")
