"""What the tests of structured pruning share: small graphs, choices, and running a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import pytest
from planish.ir import clone, infer_shapes, load
from planish.ir.structure import ChannelGroup, Choice

Arrays = dict[str, np.ndarray]

HEADER = '<ir_version: 10, opset_import: ["" : 23]>'


def _graph(text: str) -> ir.Model:
    """Parse a graph of doubles; ``a__b`` becomes the weight ``a.b``, and weights get random values."""
    model = onnx.parser.parse_model(HEADER + text)
    rng = np.random.default_rng(0)
    # What the text declares without a value is a value of the graph; no node makes it, so it is a weight.
    for value in model.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
        if value.name.endswith("var"):
            array = np.abs(array)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    result = load(model)
    for value in list(result.graph.initializers.values()):
        value.name = (value.name or "").replace("__", ".")
    infer_shapes(result)
    return result


def _run(model: ir.Model, feeds: Arrays, *, doubles: bool = True) -> Arrays:
    """All outputs; graphs of doubles by onnx's reference, which shares no code with the runtime."""
    proto = ir.to_proto(model)
    fed = {value.name or "": feeds[value.name or ""] for value in model.graph.inputs}
    names = [value.name or "" for value in model.graph.outputs]
    if doubles:
        results = onnx.reference.ReferenceEvaluator(proto).run(None, fed)
    else:
        onnx.checker.check_model(proto)
        session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
        results = session.run(names, fed)
    return dict(zip(names, results, strict=True))


def _choices(groups: Iterable[ChannelGroup], seed: int = 0) -> list[Choice]:
    """A different random part of every group stays, at least one structure and not all."""
    rng = np.random.default_rng(seed)
    return [
        Choice(group, np.sort(rng.permutation(group.structures)[: rng.integers(1, group.structures)]))
        for group in groups
    ]


def _zeroed(model: ir.Model, choices: Sequence[Choice], roles: Sequence[str] = ("consumer",)) -> ir.Model:
    """A copy in which the members of these roles are zero at all structures that go."""
    result = clone(model)
    for choice in choices:
        gone = np.delete(np.arange(choice.group.structures), choice.keep)
        for member in choice.group.members:
            if member.role in roles:
                value = result.graph.initializers[member.tensor]
                assert value.const_value is not None
                array = np.moveaxis(value.const_value.numpy().copy(), member.axis, 0)
                array[member.indices[gone].ravel()] = 0
                value.const_value = ir.tensor(
                    np.ascontiguousarray(np.moveaxis(array, 0, member.axis)), name=member.tensor
                )
    return result


@pytest.fixture(scope="session")
def graph() -> Callable[[str], ir.Model]:
    return _graph


@pytest.fixture(scope="session")
def run() -> Callable[..., Arrays]:
    return _run


@pytest.fixture(scope="session")
def choices_of() -> Callable[..., list[Choice]]:
    return _choices


@pytest.fixture(scope="session")
def zeroed() -> Callable[..., ir.Model]:
    return _zeroed
