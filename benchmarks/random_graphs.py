"""Building random ONNX graphs: a maker of nodes that spells the same thing in many ways.

`random_layers`, `random_attention`, `random_images` and `random_blocks` have the parts of networks,
`random_models` puts them together. All that is drawn comes from one generator, so that a seed is all that is
needed to have the same graph again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Dims = tuple[int | str, ...]

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
"""Where torch's exporter writes the modules that a node comes from."""
FUNCTIONS = "local.functions"
"""The domain of the model's own functions."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A value of the graph that is being built.

    Attributes:
        name: in the graph.
        dims: numbers, and symbols of the graph's inputs.
        dtype: of onnx's `TensorProto`.
    """

    name: str
    dims: Dims
    dtype: int = TensorProto.FLOAT

    @property
    def size(self) -> int:
        """The last dimension, which is always a number: features."""
        last = self.dims[-1]
        assert isinstance(last, int)
        return last


@dataclasses.dataclass(frozen=True)
class Input:
    """A graph input and how numbers for it are drawn: ``normal``, ``index`` below ``limit``, ``mask``, …."""

    tensor: Tensor
    kind: str
    limit: int = 0


class GraphMaker:
    """Collects the nodes of one model.

    Args:
        rng: all choices come from it.
        opset: of the model; ops that are newer are spelled out.
        naming: ``torch``, ``ort``, ``numbers`` or ``odd``: in whose manner things are called.
    """

    def __init__(self, rng: np.random.Generator, *, opset: int, naming: str) -> None:
        self.rng = rng
        self.opset = opset
        self.naming = naming
        self.inputs: list[Input] = []
        self.outputs: list[Tensor] = []
        self.functions: list[onnx.FunctionProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.memory: dict[str, Any] = {}
        self._bodies: list[list[onnx.NodeProto]] = [[]]
        self._scopes: list[str] = []
        self._weights: dict[tuple[int, ...], list[Tensor]] = {}
        self._inside_function = False
        self._count = 0

    # Drawing.

    def chance(self, probability: float) -> bool:
        """True so often."""
        return bool(self.rng.random() < probability)

    def pick(self, *options: Any) -> Any:
        """One of the options, all equally likely."""
        return options[int(self.rng.integers(len(options)))]

    def either(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """Operands of a commutative op, in any order."""
        order = self.rng.permutation(len(operands))
        return tuple(operands[index] for index in order)

    # Names.

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """What is made inside belongs to a module of this name."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def new_name(self, hint: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        path = ".".join(self._scopes)
        match self.naming:
            case "torch":
                return f"{hint.lower()}_{self._count}"
            case "ort":
                return f"/{path.replace('.', '/')}/{hint}_{self._count}_output_0"
            case "odd":
                return f"{hint} {path}::{self._count}é/\"'{{}}"
        return str(self._count)

    def parameter_name(self, name: str) -> str:
        """As torch would call a parameter of the current module, or a name that says nothing."""
        if self.naming == "numbers":
            return f"onnx::{self.new_name(name)}"
        path = ".".join((*self._scopes, name))
        taken = {tensor.name for tensor in self.initializers}
        while path in taken:
            path += "_"
        return path

    # Values.

    def input(self, name: str, dims: Dims, kind: str, *, limit: int = 0, dtype: int | None = None) -> Tensor:
        """A new graph input."""
        default = TensorProto.FLOAT if kind in ("normal", "past") else TensorProto.INT64
        tensor = Tensor(name, dims, default if dtype is None else dtype)
        self.inputs.append(Input(tensor, kind, limit))
        return tensor

    def find_input(self, name: str) -> Tensor | None:
        """The graph input of that name, if there is one."""
        return next((given.tensor for given in self.inputs if given.tensor.name == name), None)

    def weight(
        self, *dims: int, name: str = "weight", around: float = 0.0, spread: float | None = None
    ) -> Tensor:
        """A random parameter, now and then one that another module has already, or one in an odd form."""
        known = self._weights.get(dims, [])
        if known and not self._inside_function and name == "weight" and self.chance(0.03):
            return known[int(self.rng.integers(len(known)))]
        scale = 1 / np.sqrt(dims[0]) if spread is None else spread
        array = (around + scale * self.rng.standard_normal(dims)).astype(np.float32)
        tensor = self.constant(array, name)
        if not self.is_inside:
            self._weights.setdefault(dims, []).append(tensor)
        return tensor

    def constant(self, value: Any, name: str = "constant") -> Tensor:
        """A constant, mostly an initializer, sometimes a node or an expression of constants."""
        array = np.asarray(value)
        if self._inside_function or self.chance(0.1):
            return self.op(
                "Constant", dims=array.shape, dtype=_dtype(array), value=numpy_helper.from_array(array)
            )
        if self.chance(0.06) and array.dtype == np.float32 and array.ndim:
            return self._expression(array, name)
        return self._initializer(array, name)

    def _initializer(self, array: Array, name: str) -> Tensor:
        known = self.parameter_name(name)
        self.initializers.append(numpy_helper.from_array(np.array(array, order="C"), known))
        return Tensor(known, array.shape, _dtype(array))

    def _expression(self, array: Array, name: str) -> Tensor:
        """The same constant, computed."""
        match self.pick("identity", "double", "transposes", "concat", "reshape", "sum"):
            case "identity":
                return self.op("Identity", self._initializer(array, name), dims=array.shape)
            case "double":
                wide = self._initializer(array.astype(np.float64), name)
                return self.op("Cast", wide, dims=array.shape, to=TensorProto.FLOAT)
            case "transposes":
                turned = self._initializer(np.ascontiguousarray(array.T), name)
                return self.op("Transpose", turned, dims=array.shape)
            case "concat" if array.shape[0] > 1:
                parts = np.split(array, [array.shape[0] // 2])
                return self.op(
                    "Concat", *(self._initializer(part, name) for part in parts), dims=array.shape, axis=0
                )
            case "sum":
                half = (array / 2).astype(np.float32)
                rest = self._initializer(array - half, name)
                return self.op("Add", self._initializer(half, name), rest, dims=array.shape)
        flat = self._initializer(array.reshape(-1), name)
        shape = self._initializer(np.array(array.shape, np.int64), "shape")
        return self.op("Reshape", flat, shape, dims=array.shape)

    # Nodes.

    def op(
        self,
        op_type: str,
        *operands: Tensor | None,
        dims: Sequence[int | str] | None = None,
        dtype: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Tensor:
        """A node of one output; its shape and type are the first operand's unless they are given."""
        (result,) = self.ops(op_type, *operands, dims=[dims], dtype=dtype, domain=domain, **attributes)
        return result

    def ops(
        self,
        op_type: str,
        *operands: Tensor | None,
        dims: Sequence[Sequence[int | str] | None],
        dtype: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[Tensor, ...]:
        """A node of several outputs, one for each of ``dims``."""
        first = next((operand for operand in operands if operand is not None), None)
        if dtype is None:
            is_cast = op_type == "Cast"
            dtype = attributes["to"] if is_cast else (TensorProto.FLOAT if first is None else first.dtype)
        shapes = [(() if first is None else first.dims) if shape is None else tuple(shape) for shape in dims]
        results = tuple(Tensor(self.new_name(op_type), shape, dtype) for shape in shapes)
        node = helper.make_node(
            op_type,
            ["" if operand is None else operand.name for operand in operands],
            [result.name for result in results],
            name="" if self.naming == "odd" else f"node_{self.new_name(op_type)}",
            domain=domain,
            **attributes,
        )
        if self.naming == "torch":
            path = [".".join(self._scopes[: depth + 1]) for depth in range(len(self._scopes))]
            node.metadata_props.add(key=SCOPES_KEY, value=str(["", *path, op_type.lower()]))
        self._bodies[-1].append(node)
        return results

    @contextlib.contextmanager
    def body(self, *, of_function: bool = False) -> Iterator[list[onnx.NodeProto]]:
        """Nodes that are made inside go into a list of their own, for a subgraph or a function."""
        outside, nodes = self._inside_function, list[onnx.NodeProto]()
        self._bodies.append(nodes)
        self._inside_function = outside or of_function
        try:
            yield nodes
        finally:
            self._bodies.pop()
            self._inside_function = outside

    @property
    def is_inside(self) -> bool:
        """Whether a subgraph or function is being built."""
        return len(self._bodies) > 1

    # Small spellings that differ between opsets.

    def reduce(self, kind: str, x: Tensor, axis: int, *, keepdims: bool = True) -> Tensor:
        """``Reduce{kind}`` over one axis."""
        dims = list(x.dims)
        if keepdims:
            dims[axis] = 1
        else:
            del dims[axis]
        if kind == "Sum" or self.opset >= 18:
            axes = self.constant(np.array([axis], np.int64), "axes")
            return self.op(f"Reduce{kind}", x, axes, dims=dims, keepdims=int(keepdims))
        return self.op(f"Reduce{kind}", x, dims=dims, axes=[axis], keepdims=int(keepdims))

    def split(self, x: Tensor, sizes: Sequence[int], axis: int = -1) -> tuple[Tensor, ...]:
        """Parts of these sizes along an axis: by Split or by Slices."""
        shapes = []
        for size in sizes:
            shape = list(x.dims)
            shape[axis] = size
            shapes.append(shape)
        if self.chance(0.3):
            ends = np.cumsum(sizes).tolist()
            return tuple(self.slice(x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True))
        if self.opset >= 18 and len(set(sizes)) == 1 and self.chance(0.5):
            return self.ops("Split", x, dims=shapes, axis=axis, num_outputs=len(sizes))
        lengths = self.constant(np.array(sizes, np.int64), "sizes")
        return self.ops("Split", x, lengths, dims=shapes, axis=axis)

    def slice(self, x: Tensor, axis: int, start: int, end: int, step: int = 1) -> Tensor:
        """``x[start:end:step]`` along an axis of known size; the end may be said as a large number."""
        shape = list(x.dims)
        size = shape[axis]
        shape[axis] = len(range(start, end, step))
        if end == size and self.chance(0.5):
            end = np.iinfo(np.int64).max
        numbers = [[start], [end], [axis], [step]]
        operands = [self.constant(np.array(number, np.int64), "bound") for number in numbers]
        return self.op("Slice", x, *operands, dims=shape)

    def unsqueeze(self, x: Tensor, *axes: int) -> Tensor:
        """New axes of size 1, at these places of the result."""
        dims = list(x.dims)
        for axis in sorted(axes):
            dims.insert(axis, 1)
        return self.op("Unsqueeze", x, self.constant(np.array(axes, np.int64), "axes"), dims=dims)

    def transpose(self, x: Tensor, *order: int) -> Tensor:
        """The axes in another order."""
        return self.op("Transpose", x, dims=[x.dims[axis] for axis in order], perm=list(order))

    def cast(self, x: Tensor, dtype: int) -> Tensor:
        """The same numbers in another type."""
        return self.op("Cast", x, to=dtype)

    def dim(self, x: Tensor, axis: int) -> Tensor:
        """The length of an axis as a vector of one number."""
        if self.chance(0.5):
            return self.op("Shape", x, dims=[1], dtype=TensorProto.INT64, start=axis, end=axis + 1)
        shape = self.op("Shape", x, dims=[len(x.dims)], dtype=TensorProto.INT64)
        if self.chance(0.5):
            return self.slice(shape, 0, axis, axis + 1)
        number = self.op("Gather", shape, self.constant(np.array(axis, np.int64), "axis"), dims=[], axis=0)
        return self.unsqueeze(number, 0)

    def reshape(self, x: Tensor, dims: Sequence[int | str]) -> Tensor:
        """Another shape of the same numbers; symbols are those of ``x``."""
        symbols = [dim for dim in dims if isinstance(dim, str)]
        in_place = all(
            isinstance(dim, int) or (index < len(x.dims) and x.dims[index] == dim)
            for index, dim in enumerate(dims)
        )
        if in_place and (not symbols or self.chance(0.6)):
            numbers = [0 if isinstance(dim, str) else dim for dim in dims]
            if self.chance(0.4):
                numbers[self.pick(*range(len(dims)))] = -1
            return self.op("Reshape", x, self.constant(np.array(numbers, np.int64), "shape"), dims=dims)
        if len(symbols) == 1 and self.chance(0.5):
            numbers = [-1 if isinstance(dim, str) else dim for dim in dims]
            return self.op("Reshape", x, self.constant(np.array(numbers, np.int64), "shape"), dims=dims)
        return self.op("Reshape", x, self.shape_of(x, dims), dims=dims)

    def shape_of(self, x: Tensor, dims: Sequence[int | str]) -> Tensor:
        """A shape, computed: numbers, and lengths of axes of ``x``."""
        parts = [
            self.constant(np.array([dim], np.int64), "dim")
            if isinstance(dim, int)
            else self.dim(x, x.dims.index(dim))
            for dim in dims
        ]
        return self.op("Concat", *parts, dims=[len(parts)], axis=0)

    # The model.

    def renamed(self, tensor: Tensor, name: str) -> Tensor:
        """The same value under the name that users know it by."""
        _rename(self._bodies[0], tensor.name, name)
        return dataclasses.replace(tensor, name=name)

    def finish(self) -> onnx.ModelProto:
        """The model of all that was made."""
        known = {given.tensor.name for given in self.inputs} | {item.name for item in self.initializers}
        outputs = [self.op("Identity", output) if output.name in known else output for output in self.outputs]
        graph = helper.make_graph(
            self._bodies[0],
            "random",
            [_declared(given.tensor) for given in self.inputs],
            [_declared(output, hide=self.chance(0.2)) for output in outputs],
            self.initializers,
        )
        imports = [helper.make_opsetid("", self.opset)]
        if self.functions:
            imports.append(helper.make_opsetid(FUNCTIONS, 1))
        version = helper.find_min_ir_version_for([helper.make_opsetid("", self.opset)])
        return helper.make_model(
            graph, opset_imports=imports, functions=self.functions, ir_version=max(version, 8)
        )


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g.node, old, new)


def _declared(tensor: Tensor, *, hide: bool = False) -> onnx.ValueInfoProto:
    dims = [None if hide and isinstance(dim, str) else dim for dim in tensor.dims]
    return helper.make_tensor_value_info(tensor.name, tensor.dtype, dims)


def _dtype(array: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(array.dtype))
