"""Dimensions that symbolic arithmetic reduces to a number are numbers, not symbols that look like one."""

import onnx.parser
import onnx_ir as ir
from planish.ir import infer_shapes


def test_a_computed_dimension_is_an_int():
    text = """<ir_version: 11, opset_import: ["" : 23]> g (float[b,s,32] x) => (float[b,s,h,8] y)
    <int64[2] rest = {-1, 8}> {
        batch = Shape<start = 0, end = 1>(x) length = Shape<start = 1, end = 2>(x)
        shape = Concat<axis = 0>(batch, length, rest) r = Reshape(x, shape) y = Neg(r) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    (reshaped,) = [node.outputs[0] for node in model.graph if node.op_type == "Reshape"]
    assert [dim if isinstance(dim, int) else dim.value for dim in reshaped.shape] == ["b", "s", 4, 8]
