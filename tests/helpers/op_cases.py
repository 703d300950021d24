"""Random models of one node, and their outputs from torch and from onnxruntime side by side."""

from __future__ import annotations

import dataclasses
import math
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import onnxruntime
import torch
from planish.codegen.torch_fx import lower, run
from planish.ir.ops import OpDefinition

Array = np.ndarray[Any, Any]
Operand = Array | list[Array] | None
T = TypeVar("T")

FLOATS = ("float32", "float64", "float16")
INTEGERS = ("int32", "int64")
ANY = (*FLOATS, *INTEGERS, "uint8", "int8", "bool")
COUNT = 16
"""How many models each op is tested with."""
WITHOUT_FLOAT64 = frozenset(
    {"Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cosh", "Det", "Elu", "Mish", "PRelu", "Selu",
     "Sinh", "Softplus", "Swish", "Tan", "ThresholdedRelu"}
)  # fmt: skip
"""Ops that onnxruntime's CPU kernels do not run in float64: there, `onnx.reference` stands in."""


@dataclasses.dataclass
class Case:
    """A node with its operands.

    Attributes:
        inputs: arrays, lists of arrays for sequences, None for what is left out.
        attributes: of the node; None for what is left out.
        outputs: how many there are.
        constants: positions of inputs that onnxruntime wants as initializers. Any other may be one.
        variable: positions of inputs that are never initializers.
        terms: how many rounded terms, of the order of the largest result, are summed up in another order.
        exact: nothing is computed, so that nothing is rounded.
        reference: run by `onnx.reference`, because onnxruntime has no kernel for it.
        widened: outputs are cast to float32, because numpy does not have their type.
        opset: the op is newer than the opset of the IR.
        definition: of an op of planish, whose function is in the model.
    """

    inputs: Sequence[Operand]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outputs: int = 1
    constants: Collection[int] = ()
    variable: Collection[int] = ()
    terms: float = 1
    exact: bool = False
    reference: bool = False
    widened: bool = False
    opset: int = 23
    definition: OpDefinition | None = None

    def __post_init__(self) -> None:
        # Arithmetic on arrays without axes gives numpy's scalars.
        self.inputs = [np.asarray(x) if isinstance(x, np.generic) else x for x in self.inputs]


class Draw:
    """A source of random attributes, shapes and arrays; of ``ordinary`` ones, no infinities and zeros."""

    def __init__(self, seed: int, *, ordinary: bool = False) -> None:
        self.rng = np.random.default_rng(seed)
        self.ordinary = ordinary

    def flag(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def integer(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return int(self.rng.integers(low, high + 1))

    def integers(self, count: int, low: int, high: int) -> list[int]:
        return self.rng.integers(low, high + 1, count).tolist()

    def number(self, low: float, high: float) -> float:
        return float(np.float32(self.rng.uniform(low, high)))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]

    def maybe(self, value: T, probability: float = 0.6) -> T | None:
        return value if self.flag(probability) else None

    def shape(self, low: int = 0, high: int = 4, *, empty: bool = False) -> tuple[int, ...]:
        """Of a rank from ``low`` to ``high``; with ``empty``, every eighth one has an axis of size 0."""
        sizes = self.integers(self.integer(low, high), 1, 5)
        if empty and sizes and self.flag(1 / 8):
            sizes[self.integer(0, len(sizes) - 1)] = 0
        return tuple(sizes)

    def broadcastable(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that broadcasts to ``shape``: some axes of size 1, some of the first ones gone."""
        kept = self.integer(0, len(shape)) if self.flag(0.3) else len(shape)
        return tuple(1 if self.flag(0.3) else size for size in tuple(shape)[len(shape) - kept :])

    def axis(self, rank: int) -> int:
        return self.integer(-rank, rank - 1)

    def axes(self, rank: int, count: int | None = None) -> list[int]:
        """Different axes in any order, some counted from the end."""
        count = self.integer(0, rank) if count is None else count
        chosen = self.rng.permutation(rank)[:count].tolist()
        return [axis - rank if self.flag(0.3) else axis for axis in chosen]

    def array(self, shape: Sequence[int], dtype: str = "float32", low: float = -3, high: float = 3) -> Array:
        """Uniform between ``low`` and ``high``, both included for integers; booleans are even."""
        if dtype == "bool":
            return np.asarray(self.rng.random(tuple(shape)) < 0.5)
        if dtype.startswith("float"):
            return np.asarray(self.rng.uniform(low, high, tuple(shape))).astype(dtype)
        low = max(low, np.iinfo(dtype).min)
        return np.asarray(self.rng.integers(int(low), int(high), tuple(shape), endpoint=True)).astype(dtype)

    def vector(self, numbers: Sequence[int], dtypes: Sequence[str] = ("int64",)) -> Array:
        """A shape operand."""
        return np.array(numbers, self.choice(dtypes))

    def special(self, array: Array) -> Array:
        """The array, now and then with infinities, NaN and negative zero in it."""
        if array.dtype.kind == "f" and array.size and not self.ordinary and self.flag(0.3):
            flat = array.reshape(-1)
            for value in (math.inf, -math.inf, math.nan, -0.0, 0.0):
                flat[self.integer(0, array.size - 1)] = value
        return array


Generator = Callable[[Draw], Case]
"""Draws one case of an op."""


def agree(op_type: str, generate: Generator, count: int = COUNT, domain: str = "") -> None:
    """Compare ``count`` random models of an op."""
    for number in range(count):
        seed = zlib.crc32(op_type.encode()) + number
        draw = Draw(seed)
        case = generate(draw)
        model = model_of(op_type, case, draw, domain)
        try:
            expected = reference_outputs(op_type, model, case)
            names = [value.name for value in model.graph.input]
            found = run(lower(ir.from_proto(model)), dict(zip(names, fed(model, case), strict=True)))
            for name, array in zip((value.name for value in model.graph.output), expected, strict=True):
                assert_close(found[name], array, case)
        except Exception as error:
            error.add_note(f"{op_type}, seed {seed}:\n{onnx.printer.to_text(model.graph)}")
            for place, operand in enumerate(case.inputs):
                if isinstance(operand, np.ndarray):
                    shown = np.array2string(operand, threshold=32, edgeitems=2)
                    error.add_note(f"x{place} {operand.dtype}{list(operand.shape)}: {shown}")
            raise


def model_of(op_type: str, case: Case, draw: Draw, domain: str = "") -> onnx.ModelProto:
    """The case as a model. Which of its inputs are constant is drawn: shape operands arrive in both ways."""
    names = ["" if operand is None else f"x{place}" for place, operand in enumerate(case.inputs)]
    while names and not names[-1]:
        names.pop()
    outputs = [f"y{place}" for place in range(case.outputs)]
    results = [f"wide.{name}" for name in outputs] if case.widened else outputs
    attributes = {name: value for name, value in case.attributes.items() if value is not None}
    node = onnx.helper.make_node(op_type, names, outputs, name="node", domain=domain, **attributes)
    nodes, functions = [node], []
    if case.definition is not None:
        node.overload = case.definition.overload
        functions.append(ir.to_proto(case.definition.function(case.opset)))
    if case.widened:
        nodes += [
            onnx.helper.make_node("Cast", [name], [result], name=result, to=onnx.TensorProto.FLOAT)
            for name, result in zip(outputs, results, strict=True)
        ]
    inputs, constants = [], []
    for place, (name, operand) in enumerate(zip(names, case.inputs, strict=False)):
        if operand is None:
            continue
        constant = place in case.constants or (place not in case.variable and draw.flag(0.3))
        if constant and isinstance(operand, np.ndarray):
            constants.append(onnx.numpy_helper.from_array(operand, name))
        else:
            inputs.append(_declared(name, operand))
    graph = onnx.helper.make_graph(
        nodes, "case", inputs, [onnx.ValueInfoProto(name=name) for name in results], constants
    )
    opsets = [onnx.helper.make_opsetid("", case.opset)]
    if domain:
        opsets.append(onnx.helper.make_opsetid(domain, 1))
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=functions)


def _declared(name: str, operand: Operand) -> onnx.ValueInfoProto:
    if isinstance(operand, list):
        dtype = onnx.helper.np_dtype_to_tensor_dtype(operand[0].dtype)
        return onnx.helper.make_tensor_sequence_value_info(name, dtype, None)
    assert operand is not None
    dtype = onnx.helper.np_dtype_to_tensor_dtype(operand.dtype)
    # Sizes are not declared, so that nothing is known of them; onnxruntime wants those of shape operands.
    known = operand.shape if operand.ndim == 1 else [None] * operand.ndim
    return onnx.helper.make_tensor_value_info(name, dtype, known)


def fed(model: onnx.ModelProto, case: Case) -> list[Operand]:
    """The operands that are inputs of the graph."""
    return [case.inputs[int(value.name[1:])] for value in model.graph.input]


def reference_outputs(op_type: str, model: onnx.ModelProto, case: Case) -> list[Any]:
    """What onnxruntime's CPU kernels compute, or `onnx.reference`."""
    feeds = dict(zip((value.name for value in model.graph.input), fed(model, case), strict=True))
    double = any(isinstance(x, np.ndarray) and x.dtype == np.float64 for x in case.inputs)
    if case.reference or (double and op_type in WITHOUT_FLOAT64):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return onnx.reference.ReferenceEvaluator(model).run(None, feeds)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def assert_close(found: Any, expected: Any, case: Case) -> None:
    """Same type, same shape, and the same numbers but for rounding."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, case)
        return
    array = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert array.dtype == expected.dtype, f"{array.dtype} instead of {expected.dtype}"
    assert array.shape == expected.shape, f"{array.shape} instead of {expected.shape}"
    if case.exact or expected.dtype.kind != "f" or not expected.size:
        np.testing.assert_array_equal(array, expected)
        return
    # Each of the two rounds its terms and its result, by half a unit in the last place at best, and by some
    # units where onnxruntime takes polynomials for exp, erf, tanh and the like. What cancels in a sum leaves
    # an error of the size of its terms, which are of the order of the largest result. Of float16, single
    # steps are rounded to float16 in the one and not in the other.
    unit = float(np.finfo(expected.dtype).eps) * (4 if expected.dtype == np.float16 else 16) * case.terms
    finite = np.abs(expected[np.isfinite(expected)].astype(np.float64))
    largest = max(float(finite.max(initial=0)), 1.0)
    np.testing.assert_allclose(array, expected, rtol=unit, atol=unit * largest)
