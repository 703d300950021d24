"""Damaged models, built and not stored: each a file's bytes and what is said about it, if anything is."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from planish.ir.skeleton import encode_varint

LINEAR = """
<ir_version: 8, opset_import: ["" : 17]>
linear (float[batch, 3] x) => (float[batch, 2] y)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}>
{ y = MatMul(x, w) }
"""
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
HARMLESS = ""
"""Said of damage that changes nothing that planish reads: the model is what it was."""

Build = Callable[[], onnx.ModelProto | bytes]


def linear() -> onnx.ModelProto:
    """y = x·W, three features to two."""
    return onnx.parser.parse_model(LINEAR)


def parsed(graph: str) -> onnx.ModelProto:
    """A model of opset 17."""
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')


def changed(change: Callable[[onnx.ModelProto], object]) -> Build:
    """The linear with something changed."""

    def build() -> onnx.ModelProto:
        model = linear()
        change(model)
        return model

    return build


def weight(array: np.ndarray) -> Build:
    """The linear with another weight."""
    return changed(lambda m: m.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w")))


def with_dims(*dims: int) -> Build:
    """The linear whose weight says another shape than its data have."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    return changed(change)


def node(op_type: str, *, inputs: int = 1, **attributes: object) -> Build:
    """Another op in the place of the product, on as many of its inputs."""

    def change(model: onnx.ModelProto) -> None:
        made = helper.make_node(op_type, ["x", "w"][:inputs], ["y"], **attributes)
        model.graph.node[0].CopyFrom(made)

    return changed(change)


def calls(**bodies: list[str]) -> Build:
    """A model that calls ``F``; each function calls others one after the other."""

    def build() -> onnx.ModelProto:
        model = linear()
        for name, called in bodies.items():
            names = ["x", *(f"t{index}" for index in range(len(called) - 1)), "y"]
            nodes = [
                helper.make_node(op, [before], [after], domain="" if op == "Relu" else "f")
                for op, (before, after) in zip(called, itertools.pairwise(names), strict=True)
            ]
            model.functions.append(helper.make_function("f", name, ["x"], ["y"], nodes, OPSETS))
        model.opset_import.append(OPSETS[1])
        model.graph.node[0].CopyFrom(helper.make_node("F", ["x"], ["y"], domain="f"))
        return model

    return build


def doubling(depth: int) -> Build:
    """Functions that each call the next one twice."""
    names = ["F", *(f"F{index}" for index in range(1, depth))]
    bodies = {name: [inner, inner] for name, inner in itertools.pairwise(names)}
    return calls(**bodies, **{names[-1]: ["Relu"]})


def nested(depth: int) -> bytes:
    """Ifs within Ifs, deeper than protobuf reads, so that their bytes are put together by hand."""

    def message(number: int, content: bytes) -> bytes:
        return encode_varint(number << 3 | 2) + encode_varint(len(content)) + content

    graph = b""
    for _ in range(depth):
        attribute = message(1, b"then_branch") + message(6, graph) + b"\xa0\x01\x05"
        graph = message(1, message(2, b"o") + message(4, b"If") + message(5, attribute)) + message(2, b"g")
    return b"\x08\x08" + message(7, graph) + message(8, message(1, b"") + b"\x10\x11")


def symbol(text: str) -> Build:
    """A dimension of the input that is called something odd."""
    return changed(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", text))


def metadata(**entries: str) -> Build:
    """The linear with metadata."""

    def change(model: onnx.ModelProto) -> None:
        for key, value in entries.items():
            model.metadata_props.add(key=f"planish.{key}", value=value)

    return changed(change)


def scopes(text: str) -> Build:
    """The linear with another module path than torch writes."""
    return changed(lambda m: m.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text))


BRANCH = "then_branch = t () => (float[b, 3] u) {{ u = {body} }}"
IF = "g (float[b, 3] x, bool c) => (float[b, 3] y) {{ y = If(c) <{branches}> }}"
ELSE = "else_branch = e () => (float[b, 3] v) { v = Identity(x) }"
HUGE = (
    "g (float[b] x) => (y) <int64[1] s = {{1099511627776}}, float[1] o = {{1}}> {{ z = {op} y = Add(z, x) }}"
)

CORPUS: dict[str, tuple[Build, str]] = {
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"this is no model\n", "is not an ONNX model"),
    "zeros": (lambda: bytes(64), "is not an ONNX model"),
    # Graphs.
    "self-reference": (changed(lambda m: m.graph.node[0].input.__setitem__(0, "y")), "has a cycle"),
    "cycle": (lambda: parsed("g (float[b] x) => (float[b] y) { y = Add(z, x) z = Relu(y) }"), "has a cycle"),
    "no nodes": (changed(lambda m: m.graph.ClearField("node")), "'y' of graph 'linear' is not produced"),
    "unnamed output": (changed(lambda m: m.graph.node[0].output.__setitem__(0, "")), "is not produced"),
    "node without outputs": (changed(lambda m: m.graph.node[0].ClearField("output")), "is not produced"),
    "an input twice": (changed(lambda m: m.graph.input.append(m.graph.input[0])), "called 'x'"),
    "a value twice": (changed(lambda m: m.graph.node.append(m.graph.node[0])), "'y'"),
    "a branch reads nothing": (
        lambda: parsed(IF.format(branches=BRANCH.format(body="Identity(nowhere)") + ", " + ELSE)),
        "input 'nowhere' is no graph input",
    ),
    "If without else": (
        lambda: parsed(IF.format(branches=BRANCH.format(body="Identity(x)"))), "'else_branch' is missing"
    ),
    "thousands of Ifs in each other": (lambda: nested(3000), "is not an ONNX model"),
    "function that calls itself": (calls(F=["F"]), "a function calls itself: f::F → f::F"),
    "functions that call each other": (calls(F=["G"], G=["F"]), "a function calls itself"),
    "functions that explode": (doubling(31), "its functions make 1073741824 nodes of it"),
    # Ops.
    "unknown op": (node("Nonsense"), "is Nonsense, which is not a standard op"),
    "unknown domain": (changed(lambda m: setattr(m.graph.node[0], "domain", "nowhere")), "is not imported"),
    "unknown planish op": (
        changed(
            lambda m: (
                setattr(m.graph.node[0], "domain", "planish"),
                m.opset_import.add(domain="planish", version=1),
            )
        ),
        "the model has no function planish::MatMul",
    ),
    "too few inputs": (node("MatMul"), "expected 2 to 2 inputs, found 1"),
    "unknown attribute": (node("Relu", slope=1), "the op has no attribute 'slope'"),
    "attribute of another type": (node("Softmax", axis="one"), "'axis': expected INT, found STRING"),
    "attribute without value": (
        changed(lambda m: m.graph.node[0].attribute.add(name="axis")), "attribute 'axis' has no value"
    ),
    "missing attribute": (node("Cast"), "attribute 'to' is missing"),
    "unknown element type": (node("Cast", to=99), "99 is no element type"),
    "order of other axes": (node("Transpose", perm=[0, 0]), "is no order of the axes"),
    "Constant without value": (
        lambda: parsed("g (float[b] x) => (y) { c = Constant() y = Add(x, c) }"),
        "expected one value, found 0",
    ),
    # Versions.
    "no opset": (changed(lambda m: m.ClearField("opset_import")), "is not imported"),
    "opset 0": (changed(lambda m: setattr(m.opset_import[0], "version", 0)), "opset 0; models of opset 13"),
    "opset of the future": (changed(lambda m: setattr(m.opset_import[0], "version", 2**62)), HARMLESS),
    "file format of the future": (changed(lambda m: setattr(m, "ir_version", 2**62)), HARMLESS),
    # Types.
    "integers for floats": (weight(np.ones((3, 2), np.int64)), "input 1 ('w') is INT64"),
    "texts for floats": (
        changed(lambda m: m.graph.initializer[0].CopyFrom(
            helper.make_tensor("w", TensorProto.STRING, [3, 2], [b"text"] * 6))),
        "input 1 ('w') cannot be STRING",
    ),
    "texts as input": (
        changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING)),
        "input 0 ('x') cannot be STRING",
    ),
    "no type": (
        changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 0)), "cannot be UNDEFINED"
    ),
    "unknown type": (changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 77)), "77"),
    # Weights.
    "NaN": (weight(np.full((3, 2), np.nan, np.float32)), "holds nan at index [0, 0]"),
    "infinity": (weight(np.full((3, 2), np.inf, np.float32)), "holds inf at index [0, 0]"),
    "a weight twice": (
        changed(lambda m: m.graph.initializer.append(m.graph.initializer[0])),
        "two initializers are called 'w'",
    ),
    "2^40 elements": (with_dims(2**20, 2**20), "needs 4398046511104 bytes"),
    "product that overflows": (with_dims(2**62, 2**62), "needs 8507059173"),
    "product beyond floats": (with_dims(*[2**62] * 30), "bytes, found 24"),
    "negative size": (with_dims(-3, 2), "has a negative dimension"),
    "negative sizes": (with_dims(-3, -2), "has a negative dimension"),
    "data of another type": (
        changed(lambda m: (m.graph.initializer[0].ClearField("float_data"),
                           m.graph.initializer[0].uint64_data.extend(range(6)))),
        "its data are of another type than FLOAT",
    ),
    "no elements": (weight(np.ones((0, 2), np.float32)), HARMLESS),
    # What a node would make, if it were computed at compile time.
    "2^40 zeros": (lambda: parsed(HUGE.format(op="ConstantOfShape(s)")), HARMLESS),
    "2^40 copies": (lambda: parsed(HUGE.format(op="Expand(o, s)")), HARMLESS),
    "2^40 tiles": (lambda: parsed(HUGE.format(op="Tile(o, s)")), HARMLESS),
    "2^40 passengers": (
        changed(lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 2**40)),
        HARMLESS,
    ),
    # Texts.
    "endless name": (changed(lambda m: setattr(m.graph.node[0], "name", "n" * 10_000_000)), HARMLESS),
    "endless op": (node("n" * 1_000_000), "nnn"),
    "line breaks": (changed(lambda m: m.graph.node[0].input.__setitem__(0, "a\nb\x1b[31m")), r"a\nb\x1b[31m"),
    "symbol that never ends": (symbol("9**9**9**9"), HARMLESS),
    "symbol of brackets": (symbol("(" * 100_000), HARMLESS),
    "symbol of sums": (symbol("a+" * 20_000 + "a"), HARMLESS),
    "broken module path": (scopes("['', 'model', 7layer]"), HARMLESS),
    "endless module path": (scopes("[" * 1_000_000), HARMLESS),
    "facts that are none": (metadata(facts="nonsense"), "found 'nonsense'"),
}  # fmt: skip
