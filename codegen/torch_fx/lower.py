"""From the IR to a `torch.fx.GraphModule`: one fx node for each IR node, with autograd."""

from __future__ import annotations

import inspect
import itertools
import keyword
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import fx

from ...ir import clone
from ...ir.errors import InputError, TargetError
from ...ir.ops.definition import MINIMUM_OPSET
from . import (
    attention,
    elementwise,
    image,
    indexing,
    linear,
    norm,
    pool,
    quantized,
    recurrent,
    reduce,
    resize,
    sequence,
    shape,
)
from .module_names import ModuleNames
from .positions import computed_from_integers
from .registry import Lowering, OpKey, Registry, is_list
from .tensors import from_array, torch_dtype, torch_tensor

_GROUPS = (
    attention,
    elementwise,
    image,
    indexing,
    linear,
    norm,
    pool,
    quantized,
    recurrent,
    reduce,
    resize,
    sequence,
    shape,
)
OPS: dict[OpKey, Lowering] = {key: entry for group in _GROUPS for key, entry in group.OPS.items()}
"""How each op is lowered. A target with kernels of its own passes further entries to `lower`."""

NODE_KEY = "planish.node"
"""``fx.Node.meta``: the name of the IR node that an fx node computes."""
VALUE_KEY = "planish.value"
"""``fx.Node.meta``: the name of the IR value that an fx node holds."""
INPUTS_KEY = "planish.inputs"
"""``GraphModule.meta``: graph-input name to the name of the argument of ``forward``."""

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "precision", "softmax_precision", "stash_type"})
_MADE_IN_PLACE = frozenset({"Constant", "Identity"})


def lower(
    model: ir.Model,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trainable: Collection[str] = (),
    ops: Registry | None = None,
) -> fx.GraphModule:
    """Lower ``model`` to a torch.fx module that computes the same, differentiably.

    ``forward`` takes the graph's inputs as keyword arguments and returns a dict of the graph's outputs by
    name. A name that is no Python identifier is changed (``past_key_values.0.key`` becomes
    ``past_key_values_0_key``); `run` takes the graph's own names. Initializers become buffers under their own
    names, so that ``state_dict()`` is keyed by them. Functions of the model (the ``planish`` domain) are
    replaced by their bodies, unless ``ops`` has an entry for them.

    Args:
        model: the graph, at opset 23; not changed.
        dtype: compute in this floating-point type: weights, constants, inputs and casts to 16-, 32- and
            64-bit floats take it. By default every tensor keeps its own type. What is computed from integers
            alone keeps its own in a type of 16 bits.
        device: where weights and tensors made from numbers live.
        trainable: names of initializers that become parameters with memory of their own. All others are
            buffers that share the memory of the IR, unless ``dtype`` or ``device`` makes them copies: do not
            write to them.
        ops: entries that extend `OPS`, or take the place of its entries.

    Raises:
        TargetError: an op, attribute or element type that is not lowered, which names the node; an old opset.
        InputError: ``trainable`` names no floating-point initializer of the graph.
    """
    if model.opset_imports.get("", 0) < MINIMUM_OPSET:
        raise TargetError(
            f"torch-fx: expected opset {MINIMUM_OPSET}, found {model.opset_imports.get('', 0)}",
            hint="load the model with planish.load, which converts it up",
        )
    registry = {**OPS, **(ops or {})}
    lowered = _inline(model, registry)
    builder = _Builder(lowered.graph, registry, dtype, torch.device(device), frozenset(trainable))
    return builder.build()


def check_lowered(model: ir.Model, ops: Registry | None = None) -> None:
    """Refuse a graph with an op that neither is lowered nor has a body.

    Raises:
        TargetError: the op, which names the node.
    """
    registry = {**OPS, **(ops or {})}
    bodies = [body for key, body in model.functions.items() if key[:2] not in registry]
    for node in itertools.chain(model.graph.all_nodes(), *bodies):
        if node.op_type not in _MADE_IN_PLACE and node.op_identifier() not in model.functions:
            _entry(node, registry)


def _entry(node: ir.Node, registry: Registry) -> Lowering:
    entry = registry.get((node.domain, node.op_type))
    if entry is None:
        raise TargetError(
            f"torch-fx: node {node.name!r} is {_op_name((node.domain, node.op_type))}, which is not lowered",
            hint="lowered are " + ", ".join(sorted(_op_name(key) for key in registry)),
        )
    for name, lowered in entry.only.items():
        if name in node.attributes and node.attributes[name].value != lowered:
            raise TargetError(
                f"torch-fx: node {node.name!r} ({node.op_type}): attribute {name!r} is "
                f"{node.attributes[name].value!r}, and only {lowered!r} is lowered"
            )
    return entry


def run(module: fx.GraphModule, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Call a lowered module with feeds (arrays or tensors) by graph-input name.

    Raises:
        InputError: an input is missing or unknown.
    """
    names: Mapping[str, str] = module.meta[INPUTS_KEY]
    if feeds.keys() != names.keys():
        different = sorted(feeds.keys() ^ names.keys())[0]
        problem = "is missing" if different in names else "is unknown"
        raise InputError(f"torch-fx: input {different!r} {problem}; the graph's inputs are {list(names)}")
    result: dict[str, Any] = module(**{names[name]: _as_tensor(value) for name, value in feeds.items()})
    return result


def _as_tensor(value: Any) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray | torch.Tensor):
        return [item if isinstance(item, torch.Tensor) else from_array(item) for item in value]  # a sequence
    return value if isinstance(value, torch.Tensor) else from_array(np.asarray(value))


def _inline(model: ir.Model, registry: Registry) -> ir.Model:
    """The model without calls of functions that the registry does not know; a copy if there are any."""
    if all(key[:2] in registry for key in model.functions):
        return model
    copy = clone(model)
    InlinePass(criteria=lambda function: (function.domain, function.name) not in registry)(copy)
    return copy


class _Builder:
    """Walks one graph and builds the fx graph node by node."""

    def __init__(
        self,
        graph: ir.Graph,
        registry: Registry,
        dtype: torch.dtype | None,
        device: torch.device,
        trainable: frozenset[str],
    ) -> None:
        self._source = graph
        self._registry = registry
        self._dtype = dtype
        self._device = device
        self._trainable = trainable
        self._graph = fx.Graph()
        narrow = dtype is not None and dtype.itemsize < torch.float32.itemsize
        self._wide = computed_from_integers(graph) if narrow else frozenset[ir.Node]()
        self._values: dict[ir.Value, fx.Node] = {}
        self._narrowed: dict[ir.Value, fx.Node] = {}
        self._constants: dict[tuple[ir.Value, torch.dtype | None], fx.Node] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._names = ModuleNames()
        self._arguments: set[str] = set()

    def build(self) -> fx.GraphModule:
        self._check_trainable()
        inputs = {value.name or "": self._placeholder(value) for value in self._inputs()}
        for node in self._source:
            self._lower_node(node)
        self._graph.output({value.name or "": self._value(value) for value in self._source.outputs})
        module = fx.GraphModule(self._tensors, self._graph, class_name="LoweredModel")
        module.meta[INPUTS_KEY] = inputs
        return module

    def _inputs(self) -> list[ir.Value]:
        """The inputs that callers must give: an input with a default keeps the default."""
        return [value for value in self._source.inputs if value.const_value is None]

    def _check_trainable(self) -> None:
        for name in sorted(self._trainable):
            value = self._source.initializers.get(name)
            if value is None or value.dtype is None or not value.dtype.is_floating_point():
                raise InputError(
                    f"torch-fx: trainable: {name!r} is no floating-point initializer of the graph"
                )

    def _placeholder(self, value: ir.Value) -> str:
        argument = re.sub(r"\W", "_", value.name or "input", flags=re.ASCII)
        while not argument.isidentifier() or keyword.iskeyword(argument) or argument in self._arguments:
            argument = f"_{argument}"
        self._arguments.add(argument)
        node = self._graph.placeholder(argument)
        node.meta[VALUE_KEY] = value.name
        if self._dtype is not None and value.dtype is not None and value.dtype.is_floating_point():
            if isinstance(value.type, ir.SequenceType):
                node = self._graph.call_function(sequence.converted, (node, self._dtype))
            else:
                node = self._graph.call_method("to", (node, self._dtype))
        self._values[value] = node
        return argument

    def _lower_node(self, node: ir.Node) -> None:
        if node.domain == "" and node.op_type == "Constant":
            return  # made where it is read
        if node.domain == "" and node.op_type == "Identity":
            self._values[node.outputs[0]] = self._operand(node, 0)
            return
        entry = _entry(node, self._registry)
        arguments = [self._argument(node, index, entry) for index in range(len(node.inputs))]
        while arguments and arguments[-1] is None:
            arguments.pop()
        attributes = self._attributes(node)
        self._check_result_type(node, entry)
        if entry.creates and self._device.type != "cpu":
            attributes["device"] = str(self._device)
        _check_call(node, entry.function, arguments, attributes)
        call = self._graph.create_node(
            "call_function", entry.function, tuple(arguments), attributes, name=node.name or node.op_type
        )
        call.meta[NODE_KEY] = node.name
        self._bind_outputs(node, call, several=entry.several)

    def _check_result_type(self, node: ir.Node, entry: Lowering) -> None:
        """Refuse a result of integers narrower than a byte: that they are is not seen by the function."""
        like = node.inputs[entry.like] if entry.like is not None and entry.like < len(node.inputs) else None
        if like is not None:
            tensor = ir.convenience.get_const_tensor(like)
            dtype = like.dtype if tensor is None else tensor.dtype
            if dtype is not None:
                self._type(node, dtype)

    def _bind_outputs(self, node: ir.Node, call: fx.Node, *, several: bool) -> None:
        for index, value in enumerate(node.outputs):
            if not value.uses() and not value.is_graph_output():
                continue
            if several:
                item = self._graph.create_node(
                    "call_function", operator.getitem, (call, index), name=value.name
                )
                item.meta[NODE_KEY] = node.name
            elif index == 0:
                item = call
            else:
                raise TargetError(
                    f"torch-fx: node {node.name!r} ({node.op_type}): output {index} ({value.name!r}) is "
                    "used, and only the first one is lowered"
                )
            item.meta[VALUE_KEY] = value.name
            self._values[value] = item

    def _argument(self, node: ir.Node, index: int, entry: Lowering) -> Any:
        value = node.inputs[index]
        if value is None:
            return None
        if index in entry.integers:
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None and _is_list(tensor, entry):
                return tensor.numpy().tolist()
        return self._value(value, exact=index in entry.exact or node in self._wide)

    def _operand(self, node: ir.Node, index: int) -> fx.Node:
        value = node.inputs[index]
        if value is None:
            raise TargetError(f"torch-fx: node {node.name!r} ({node.op_type}) has no input {index}")
        return self._value(value)

    def _value(self, value: ir.Value, *, exact: bool = False) -> fx.Node:
        """The fx node that holds a value, in its own type or the module's."""
        tensor = ir.convenience.get_const_tensor(value)
        if value in self._values:
            found = self._values[value]
            return found if exact or value.producer() not in self._wide else self._narrow(value, found)
        if tensor is None:
            raise TargetError(f"torch-fx: {value.name!r} is read before it is computed")
        dtype = None if exact or not tensor.dtype.is_floating_point() else self._dtype
        if (value, dtype) not in self._constants:
            self._constants[value, dtype] = self._constant(value, tensor, dtype)
        return self._constants[value, dtype]

    def _narrow(self, value: ir.Value, wide: fx.Node) -> fx.Node:
        """A result that was computed in 32 bits in the module's type."""
        if value.dtype is None or not value.dtype.is_floating_point():
            return wide
        if value not in self._narrowed:
            self._narrowed[value] = self._graph.call_method("to", (wide, self._dtype))
        return self._narrowed[value]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, dtype: torch.dtype | None) -> fx.Node:
        result = torch_tensor(tensor, dtype)
        name = value.name or "constant"
        if result is None:
            raise TargetError(
                f"torch-fx: initializer {name!r} is {tensor.dtype.name}, which torch does not have"
            )
        result = result.to(self._device)
        if name in self._trainable:
            result = torch.nn.Parameter(result.clone())
        target = self._names.add(name)
        self._tensors[target] = result
        node = self._graph.create_node("get_attr", target, name=name)
        node.meta[VALUE_KEY] = name
        return node

    def _attributes(self, node: ir.Node) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            if name in _TYPE_ATTRIBUTES and attribute.type == ir.AttributeType.INT:
                if attribute.as_int():
                    attributes[name] = self._type(node, ir.DataType(attribute.as_int()))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().size == 1:
                tensor = attribute.as_tensor()
                attributes[name] = tensor.numpy().reshape(-1)[0].item()
                attributes["dtype"] = self._type(node, tensor.dtype)
            elif attribute.type in _PLAIN_TYPES:
                plain = attribute.value
                attributes[name] = (
                    list(plain) if isinstance(plain, Sequence) and not isinstance(plain, str) else plain
                )
            else:
                raise TargetError(
                    f"torch-fx: node {node.name!r} ({node.op_type}): attribute {name!r} of type "
                    f"{attribute.type.name} is not lowered"
                )
        return attributes

    def _type(self, node: ir.Node, dtype: ir.DataType) -> torch.dtype:
        found = torch_dtype(dtype, None if node in self._wide else self._dtype)
        if found is None or dtype.bitwidth < 8:
            raise TargetError(f"torch-fx: node {node.name!r} ({node.op_type}): torch has no {dtype.name}")
        return found


_PLAIN_TYPES = frozenset(
    {
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)


def _is_list(tensor: ir.TensorProtocol, entry: Lowering) -> bool:
    """Whether a constant of a shape operand is handed over as numbers."""
    if entry.creates and tensor.dtype != ir.DataType.INT64:
        return False
    return is_list(tensor.shape.numpy())


def _op_name(key: OpKey) -> str:
    domain, op_type = key
    return f"{domain}::{op_type}" if domain else op_type


def _check_call(
    node: ir.Node, function: Callable[..., Any], arguments: Sequence[Any], attributes: Mapping[str, Any]
) -> None:
    """Refuse a node whose inputs or attributes the function does not take."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # built into torch: tensors only
        problem = f"takes no attribute {next(iter(attributes))!r}" if attributes else ""
    else:
        try:
            signature.bind(*arguments, **attributes)
            problem = ""
        except TypeError as error:
            problem = str(error)
    if problem:
        raise TargetError(f"torch-fx: node {node.name!r} ({node.op_type}): {problem}")
