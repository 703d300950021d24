"""Tracing torch modules: names, structure, shared weights, dynamic sizes, errors that name the place."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from planish.ir.errors import InputError, TraceError
from planish.ir.signature import META_KEY, REMARKS_KEY, flatten_inputs, unflatten_outputs
from planish.ir.trace import trace

RTOL = 1e-5
"""Sums of at most a hundred float32 products in another order differ by less than 100 × 2⁻²⁴ ≈ 6e-6."""


def run(model: ir.Model, *args: Any, **kwargs: Any) -> Any:
    """Call a traced model like its module, in onnxruntime."""
    signature = model.meta[META_KEY]
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {name: tensor.numpy() for name, tensor in flatten_inputs(signature, args, kwargs).items()}
    return unflatten_outputs(signature, session.run(list(signature.output_names), feeds))


def names(values: Any) -> list[str]:
    return [value.name for value in values]


def shape(value: ir.Value) -> list[str]:
    return [str(dim) for dim in value.shape or ()]


class Model(torch.nn.Module):
    """Tied weights, buffers of all kinds, nested arguments, options, and a result of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.first_norm, self.second_norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("offset", torch.arange(4.0), persistent=False)

    def forward(self, ids, pair, flag=True, unused=None, *, power=1):
        hidden = self.second_norm(self.first_norm(self.embedding(ids))) * self.scale + self.offset
        hidden = (hidden + pair[0].unsqueeze(1) + pair[1]["b"].unsqueeze(1)) ** power
        return {
            "logits": self.head(hidden),
            "ids": ids,
            "again": (hidden, None, power, hidden.shape[0]),
            "hidden": hidden,
            "scale": self.scale,
        }


def call_of(batch: int, length: int) -> tuple[Any, ...]:
    ids = torch.arange(batch * length).reshape(batch, length) % 10
    return ids, (torch.full((batch, 4), 0.5), {"b": torch.arange(batch * 4.0).reshape(batch, 4)})


@pytest.fixture(scope="module")
def module() -> Model:
    torch.manual_seed(0)
    module = Model()
    module.first_norm.eval()
    return module


@pytest.fixture(scope="module")
def traced(module: Model) -> ir.Model:
    """Traced with a batch and a length of one, which torch.export alone would take for constants."""
    return trace(module, call_of(1, 1))


def test_inputs_and_outputs_have_the_names_of_arguments_and_results(traced: ir.Model) -> None:
    assert names(traced.graph.inputs) == ["ids", "pair.0", "pair.1.b"]
    # An output may not share the name of an input or a buffer.
    assert names(traced.graph.outputs) == [
        "logits",
        "ids_output",
        "again.0",
        "again.3",
        "hidden",
        "scale_output",
    ]


def test_parameters_keep_their_names_and_ties_are_one_initializer(module: Model, traced: ir.Model) -> None:
    initializers = traced.graph.initializers
    expected = {*dict(module.named_parameters()), *dict(module.named_buffers())}
    assert expected <= set(initializers)
    assert "head.weight" not in initializers
    embedding = initializers["embedding.weight"]
    assert embedding.metadata_props["planish.tied_names"] == "head.weight"
    assert {node.op_type for node in embedding.consumers()} == {"Gather", "Transpose"}
    assert initializers["first_norm.weight"] is not initializers["second_norm.weight"]


def test_weights_are_shared_with_the_module(module: Model, traced: ir.Model) -> None:
    tensor = traced.graph.initializers["embedding.weight"].const_value
    module_weight = module.embedding.weight.detach().numpy()
    assert np.shares_memory(tensor.numpy(), module_weight)


def test_dimensions_have_the_names_that_users_know(traced: ir.Model) -> None:
    assert shape(traced.graph.inputs[0]) == ["batch_size", "sequence_length"]
    assert shape(traced.graph.inputs[1]) == ["batch_size", "4"]
    assert shape(traced.graph.outputs[0]) == ["batch_size", "sequence_length", "10"]


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7)])
def test_results_are_those_of_the_module_at_other_sizes(module, traced, batch, length) -> None:
    found, expected = run(traced, *call_of(batch, length)), module.eval()(*call_of(batch, length))
    assert list(found) == list(expected)
    assert found["again"][1:] == expected["again"][1:] == (None, 1, batch)
    for name in ("logits", "hidden", "scale"):
        np.testing.assert_allclose(found[name], expected[name].detach(), rtol=RTOL, atol=RTOL)
    np.testing.assert_array_equal(found["ids"], expected["ids"])


def test_the_opset_is_the_one_asked_for(traced: ir.Model) -> None:
    assert traced.graph.opset_imports[""] == 23


def test_nodes_tell_the_module_path_without_the_wrapper(traced: ir.Model) -> None:
    paths = {node.metadata_props.get("pkg.torch.onnx.name_scopes", "") for node in traced.graph}
    assert any("'first_norm'" in path for path in paths)
    assert not any("module." in path for path in paths)
    assert not any("stack_trace" in key for node in traced.graph for key in node.metadata_props)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, add):
        return self.norm(self.linear(add)) + 1


def test_the_module_and_the_loggers_are_left_as_they_were(capfd) -> None:
    module = Block()
    module.norm.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    trace(module, torch.randn(2, 4))
    assert module.training
    assert module.linear.training
    assert not module.norm.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert logging.getLogger("torch.onnx").level == level
    assert capfd.readouterr() == ("", "")


def test_one_tensor_gives_one_output_and_input_names_win_over_inner_names() -> None:
    module = Block().eval()
    model = trace(module, torch.randn(2, 4))
    assert names(model.graph.inputs) == ["add"]
    assert names(model.graph.outputs) == ["output"]
    example = torch.randn(5, 4)
    np.testing.assert_allclose(run(model, example), module(example).detach(), rtol=RTOL, atol=RTOL)


class Pair(torch.nn.Module):
    def forward(self, x, *rest):
        return x + rest[0], [x * rest[1]]


def test_variadic_arguments_and_tuples_of_results() -> None:
    model = trace(Pair(), (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)))
    assert names(model.graph.inputs) == ["x", "rest.0", "rest.1"]
    assert names(model.graph.outputs) == ["output_0", "output_1.0"]
    total, (product,) = run(model, torch.ones(4, 3), torch.ones(4, 3), torch.full((4, 3), 3.0))
    assert (total == 2).all()
    assert (product == 3).all()


def test_an_exported_program_is_accepted_with_its_own_dimensions() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x, flag=True, *, y=None):
            return {"result": self.linear(x), "nothing": (x, None)}

    module = Module().eval()
    program = torch.export.export(
        module,
        (torch.randn(3, 4), True),
        {"y": None},
        dynamic_shapes={"x": {0: torch.export.Dim("n")}, "flag": None, "y": None},
    )
    model = trace(program)
    assert {"linear.weight", "linear.bias"} <= set(model.graph.initializers)
    assert shape(model.graph.inputs[0]) == ["batch_size", "4"]
    example = torch.randn(7, 4)
    found, expected = run(model, example, y=None), module(example)
    np.testing.assert_allclose(found["result"], expected["result"].detach(), rtol=RTOL, atol=RTOL)
    np.testing.assert_array_equal(found["nothing"][0], example)
    assert found["nothing"][1] is None


class Fixed(torch.nn.Module):
    def forward(self, x):
        return x * int(x.shape[1])


def test_a_size_that_the_code_fixes_is_a_remark_or_an_error_with_its_line() -> None:
    line = Fixed.forward.__code__.co_firstlineno + 1
    model = trace(Fixed(), torch.zeros(2, 3, dtype=torch.int64))
    assert shape(model.graph.inputs[0]) == ["batch_size", "3"]
    (remark,) = model.meta[REMARKS_KEY]
    assert remark.startswith("dimension 1 (sequence_length) of 'x' is fixed at 3")
    assert f"{Path(__file__).name}:{line}" in remark
    with pytest.raises(TraceError, match=rf"dimension 1 \(n\) of 'x' is fixed at 3.*:{line}"):
        trace(Fixed(), torch.zeros(2, 3), dynamic_shapes={"x": {1: "n"}})


class Decides(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.linear(x)
        if hidden.sum() > 0:
            return hidden
        return -hidden


class NoOnnxForm(torch.nn.Module):
    def forward(self, x):
        hidden = x + 1
        return torch.linalg.eigh(hidden @ hidden.T)[0]


class WrongShape(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden)


class Refuses(torch.nn.Module):
    def forward(self, x):
        try:
            return {}["key"]
        except KeyError:
            raise ValueError("the widths do not fit")  # noqa: B904 - what user code does


class Wrapped(torch.nn.Module):
    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4), block])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("block", "place", "line", "reason"),
    [
        (Decides, "blocks.1 (Decides)", 2, "decides by a tensor's value"),
        (NoOnnxForm, "in blocks.1", 2, "eigh"),
        (WrongShape, "blocks.1.down (Linear)", 2, "reduction dim"),
        (Refuses, "blocks.1 (Refuses)", 4, "ValueError: the widths do not fit"),
    ],
)
def test_a_failure_names_the_submodule_and_the_line(block, place, line, reason, capfd) -> None:
    with pytest.raises(TraceError) as caught:
        trace(Wrapped(block()), torch.randn(2, 4))
    message = str(caught.value)
    number = block.forward.__code__.co_firstlineno + line
    assert place in message
    assert f"{Path(__file__).name}:{number}" in message
    assert reason in message
    assert "\n" not in message
    assert caught.value.hint
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


class Counts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.calls


class ReturnsObject(torch.nn.Module):
    def forward(self, x):
        return {"x": x, "thing": object()}


class ReturnsNothing(torch.nn.Module):
    def forward(self, x):
        return None


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Counts(), "writes to 'calls' in forward"),
        (ReturnsObject(), "returns a object in 'thing'"),
        (ReturnsNothing(), "returns no tensor"),
    ],
)
def test_what_no_graph_can_do_is_an_error(module, message) -> None:
    with pytest.raises(TraceError, match=message):
        trace(module, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Block(),), "Block needs example_inputs"),
        ((Block(), {"y": torch.zeros(2, 4)}), r"do not fit Block\.forward"),
        ((Block(), (3,)), "hold no tensor"),
        ((Block(), (object(),)), "'add' is a object, neither tensor nor option"),
        ((Block(), torch.zeros(2, 4), "static"), "dynamic_shapes is 'static'"),
        ((lambda x: x, torch.zeros(2)), r"a torch\.nn\.Module was expected, found a function"),
    ],
)
def test_wrong_input_is_one_clear_error(arguments, message) -> None:
    module, example_inputs, dynamic_shapes = (*arguments, None, None)[:3]
    with pytest.raises(InputError, match=message):
        trace(module, example_inputs, dynamic_shapes=dynamic_shapes)


def test_a_module_wrapped_by_torch_compile_keeps_its_names() -> None:
    model = trace(torch.compile(torch.nn.Linear(4, 4)), torch.zeros(2, 4))
    assert {"weight", "bias"} <= set(model.graph.initializers)


def test_small_float_types_stay_as_they_are() -> None:
    model = trace(torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16))
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.BFLOAT16
    assert model.graph.initializers["weight"].dtype == ir.DataType.BFLOAT16
