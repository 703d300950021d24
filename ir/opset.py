"""Converting a model up to the opset of the IR, in place, leaving all that is not standard ONNX untouched.

The ops whose meaning changed between opset 13 and opset 23 are few; each has an adapter here, and a test
compares the schemas of all versions to prove that none is missing. onnxscript's converter is not used because
it inlines the model's functions, and keeps nodes it cannot convert while it still raises the version; onnx's
own converter copies all weights into protobuf and drops functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from .errors import ModelError
from .walk import root_graphs

OPSET = 23
"""The version of the standard domain in which the passes read and write the IR."""
OLDEST_OPSET = 13
IR_VERSION = 11
"""The first version of the file format that may hold opset 23."""

WITHOUT_KERNEL = frozenset(
    {"GlobalLpPool", "MaxRoiPool", "Multinomial", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike", "RoiAlign"}
)
"""Ops that opset 22 gave more types, and that onnxruntime (1.31) has no kernel for since: converting a model
that runs would give one that does not."""


def convert_opset(model: ir.Model, *, source: str) -> str | None:
    """Convert ``model`` to opset 23 in place, or leave all of it as it is and say why.

    Models newer than opset 23 and models that do not use the standard domain are left alone without a remark.

    Raises:
        ModelError: the model is older than opset 13.
    """
    versions = [root.opset_imports[""] for root in root_graphs(model) if "" in root.opset_imports]
    if not versions or max(versions) > OPSET or min(versions) == OPSET:
        return None
    if min(versions) < OLDEST_OPSET:
        raise ModelError(
            f"{source}: opset {min(versions)}; models of opset {OLDEST_OPSET} or newer can be read",
            hint=f"convert it first: onnx.version_converter.convert_version(model, {OLDEST_OPSET})",
        )
    for node, version in _standard_nodes(model):
        obstacle = _obstacle(node, version)
        if obstacle is not None:
            return f"kept at opset {versions[0]}: node {node.op_type} '{node.name}' {obstacle}"
    for node, version in list(_standard_nodes(model)):
        for adapter in _adapters_for(node, version):
            adapter.apply(node)
    for root in root_graphs(model):
        if "" in root.opset_imports:
            root.opset_imports[""] = OPSET
    return None


def settle_ir_version(model: ir.Model) -> None:
    """Set the version of the file format to what the model needs: runtimes refuse newer ones."""
    opset = model.opset_imports.get("", OPSET)
    if opset <= OPSET:
        model.ir_version = IR_VERSION
    elif opset <= onnx.defs.onnx_opset_version():
        model.ir_version = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])


def _standard_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    for root in root_graphs(model):
        version = root.opset_imports.get("", OPSET)
        for graph in (root, *root.subgraphs()):
            for node in graph:
                if node.domain == "":
                    yield node, version


def _obstacle(node: ir.Node, version: int) -> str | None:
    try:
        schema = onnx.defs.get_schema(node.op_type, OPSET, "")
    except onnx.defs.SchemaError:
        return f"is not an op of opset {OPSET}"
    if node.op_type in WITHOUT_KERNEL and version < schema.since_version:
        return f"has no kernel in onnxruntime in opset {schema.since_version} or newer"
    if schema.deprecated:
        return f"is deprecated in opset {OPSET}"
    for adapter in _adapters_for(node, version):
        for name in adapter.attributes:
            if name in node.attributes and node.attributes[name].is_ref():
                return f"takes its '{name}' from the function around it, which opset {adapter.since} cannot"
        obstacle = adapter.obstacle(node)
        if obstacle is not None:
            return obstacle
    return None


def _adapters_for(node: ir.Node, version: int) -> Iterator[Adapter]:
    return (a for a in ADAPTERS if a.since > version and node.op_type in a.op_types)


def _no_obstacle(node: ir.Node) -> str | None:
    del node
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """How nodes written for opsets before ``since`` are spelled from it on.

    Attributes:
        since: the opset that changed the op.
        op_types: the ops that changed in the same way.
        attributes: attributes whose value the adapter must know.
        apply: rewrites a node in place.
        obstacle: why a node cannot be converted, or None.
    """

    since: int
    op_types: frozenset[str]
    attributes: Sequence[str] = ()
    apply: Callable[[ir.Node], None]
    obstacle: Callable[[ir.Node], str | None] = _no_obstacle


def _training_outputs(node: ir.Node) -> str | None:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return "is in training mode, whose outputs changed in opset 14"
    return None


def _drop_training_outputs(node: ir.Node) -> None:
    node.resize_outputs(1)


def _axes_to_input(node: ir.Node) -> None:
    if "axes" in node.attributes:
        axes = np.array(node.attributes.pop("axes").as_ints(), np.int64)
        node.resize_inputs(2)
        node.replace_input_with(1, _constant(node, axes))


def _count_outputs(node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _axis_to_input(node: ir.Node) -> None:
    axis = node.attributes.pop("axis").as_int() if "axis" in node.attributes else 1
    node.resize_inputs(3)
    node.replace_input_with(2, _constant(node, np.array(axis, np.int64)))


def _rename_interpolation(node: ir.Node) -> None:
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "bilinear"
    node.attributes["mode"] = ir.AttrString(
        "mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    )


def _repeat_per_channel(node: ir.Node) -> None:
    """Scale and bias, one per group before opset 21, become one per channel: repeated C / groups times."""
    groups = np.array([node.attributes["num_groups"].as_int()], np.int64)
    channels = _insert(node, "Shape", [node.inputs[0]], start=1, end=2)
    repeats = _insert(node, "Div", [channels, _constant(node, groups)])
    one = _constant(node, np.array([1], np.int64))
    target = _insert(node, "Concat", [one, repeats], axis=0)
    for index in (1, 2):
        column = _insert(node, "Unsqueeze", [node.inputs[index], one])
        spread = _insert(node, "Expand", [column, target])
        flat = _insert(node, "Reshape", [spread, _constant(node, np.array([-1], np.int64))])
        node.replace_input_with(index, flat)


def _constant(node: ir.Node, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> ir.Value:
    # A node and not an initializer: function bodies cannot own initializers.
    return _insert(node, "Constant", [], value=ir.tensor(array))


def _insert(node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
    """Add a node before ``node``, named after its output and the growing size of the graph: unique names."""
    graph = node.graph
    assert graph is not None
    new = ir.node(op_type, inputs, attributes=attributes)  # type: ignore[arg-type]
    new.metadata_props.update(node.metadata_props)
    graph.insert_before(node, new)
    label = next((output.name for output in node.outputs if output.name), node.name)
    new.name = f"{label}/opset{OPSET}_{op_type}_{len(graph)}"
    new.outputs[0].name = f"{new.name}_output"
    return new.outputs[0]


_REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
)

ADAPTERS: tuple[Adapter, ...] = (
    Adapter(
        since=14,
        op_types=frozenset({"BatchNormalization"}),
        apply=_drop_training_outputs,
        obstacle=_training_outputs,
    ),
    Adapter(since=18, op_types=_REDUCTIONS, attributes=("axes",), apply=_axes_to_input),
    Adapter(since=18, op_types=frozenset({"Split"}), apply=_count_outputs),
    Adapter(since=20, op_types=frozenset({"DFT"}), attributes=("axis",), apply=_axis_to_input),
    Adapter(since=20, op_types=frozenset({"GridSample"}), attributes=("mode",), apply=_rename_interpolation),
    Adapter(
        since=21,
        op_types=frozenset({"GroupNormalization"}),
        attributes=("num_groups",),
        apply=_repeat_per_channel,
    ),
)
