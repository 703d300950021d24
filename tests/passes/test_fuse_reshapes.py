"""Two reshapes that end in the shape they began with are none, also where the shapes are not numbers."""

import onnx.parser
import onnx.shape_inference
import onnx_ir as ir
import pytest
from planish.passes.fuse.reshapes import CollapseReshapes
from planish.passes.infrastructure.rewriter import apply_rules


def collapsed(first: str, second: str, inner: str, outer: str) -> list[str]:
    proto = onnx.parser.parse_model(f"""<ir_version: 11, opset_import: ["" : 23]>
        g (float[b,s,32] x) => (float[{outer}] y)
        <int64[4] first = {{{first}}}, int64[3] second = {{{second}}}> {{
            split = Reshape(x, first)
            joined = Reshape(split, second)
            y = Relu(joined)
        }}""")
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    nodes = {node.outputs[0].name: node for node in model.graph}
    # What the exporter knows of the sizes and ONNX shape inference does not find.
    nodes["split"].outputs[0].shape = ir.Shape(_dims(inner))
    nodes["joined"].outputs[0].shape = ir.Shape(_dims(outer))
    apply_rules(model, [CollapseReshapes()])
    return [node.op_type for node in model.graph]


def _dims(text: str) -> list[int | str]:
    return [int(dim) if dim.isdecimal() else dim for dim in text.split(",")]


def test_heads_split_and_joined_again_with_an_inferred_axis() -> None:
    assert collapsed("0, -1, 4, 8", "0, 0, 32", "b,s,4,8", "b,s,32") == ["Relu"]


@pytest.mark.parametrize(
    ("second", "outer"),
    [("0, 32, -1", "b,32,s"), ("-1, 2, 32", "n,2,32")],
    ids=["another order", "another length"],
)
def test_reshapes_to_another_shape_stay(second: str, outer: str) -> None:
    assert "Reshape" in collapsed("0, -1, 4, 8", second, "b,s,4,8", outer)
