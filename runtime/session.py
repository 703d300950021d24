"""Running a graph with onnxruntime: from the IR in memory to outputs, without copies where it allows.

Weights are handed to onnxruntime beside the graph, so that no serialised copy of the model is made. Those
that only kernels of its own domain read, as the integers of a quantised layer, it reads where they are; of
others it makes a copy, because its graph optimisations may rewrite them (a transpose that is moved into a
weight keeps the weight's name). It may keep its own *prepacked* form of either. Inputs are read in place.
Outputs stay in the buffers that onnxruntime allocated and are viewed through DLPack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.utils.dlpack

from ..codegen.target import BoundModel, Target
from ..ir import clone
from ..ir.errors import InputError, TargetError
from ..ir.graph_builder import CONTRIB

Array = np.ndarray[Any, Any]

_PLACEHOLDER_FILE = "in-memory"
# Below this many bytes a weight travels inside the serialised graph, where onnxruntime can fold constants.
_SMALL_TENSOR_BYTES = 4096


class Session:
    """One onnxruntime session over a bound model.

    Args:
        bound: the model as its target bound it, or a plain graph that onnxruntime can run.
        target: supplies the execution providers; CPU when absent.
        threads: intra-op threads; onnxruntime's default (one per core) when absent.

    Raises:
        TargetError: onnxruntime rejects the model.
    """

    def __init__(
        self, bound: BoundModel | ir.Model, *, target: Target | None = None, threads: int | None = None
    ) -> None:
        if isinstance(bound, ir.Model):
            bound = BoundModel(model=bound)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        for key, value in bound.session_options.items():
            options.add_session_config_entry(key, value)
        serialized, self._shared_weights = serialize_sharing_weights(bound.model, options, in_place=True)
        self._session = open_session(
            serialized,
            options,
            providers=target.providers() if target else None,
            disabled_optimizers=list(bound.disabled_optimizers),
        )
        self.inputs = tuple(self._session.get_inputs())
        self.outputs = tuple(self._session.get_outputs())
        self.output_names = tuple(output.name for output in self.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Arrays in, arrays out, by graph-input and graph-output name.

        Raises:
            InputError: an input is missing, unknown, or has the wrong dtype or rank.
        """
        return {name: tensor.numpy() for name, tensor in self.run_torch(feeds).items()}

    def run_torch(self, feeds: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Like `run`, with the outputs as CPU tensors that own onnxruntime's buffers."""
        check_feeds(self.inputs, feeds)
        values = {
            argument.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.asarray(feeds[argument.name], order="C")
            )
            for argument in self.inputs
        }
        try:
            outputs = self._session.run_with_ort_values(None, values)
        except Exception as error:
            shapes = ", ".join(f"{name} {list(np.shape(array))}" for name, array in feeds.items())
            raise InputError(
                f"onnxruntime could not run the model on inputs {shapes}: {first_line(error)}"
            ) from error
        return {name: as_tensor(value) for name, value in zip(self.output_names, outputs, strict=True)}

    def value(self, array: Array) -> onnxruntime.OrtValue:
        """A copy of an array where onnxruntime keeps its own."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))

    def run_values(
        self, given: Mapping[str, Array | onnxruntime.OrtValue]
    ) -> dict[str, onnxruntime.OrtValue]:
        """Run once; arrays and values in, values out, without copies; onnxruntime's own errors."""
        binding = self._session.io_binding()
        for name, value in given.items():
            if isinstance(value, onnxruntime.OrtValue):
                binding.bind_ortvalue_input(name, value)
            else:
                binding.bind_cpu_input(name, np.asarray(value, order="C"))
        for name in self.output_names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return dict(zip(self.output_names, binding.get_outputs(), strict=True))

    def io_binding(self) -> onnxruntime.IOBinding:
        """A new binding of inputs and outputs to memory, for `run_with_binding`."""
        return self._session.io_binding()

    def run_with_binding(self, binding: onnxruntime.IOBinding) -> None:
        """Run once on what is bound. onnxruntime's own errors come through."""
        self._session.run_with_iobinding(binding)

    def repeatable(self, feeds: Mapping[str, Array]) -> Callable[[], None]:
        """A call that runs on these feeds again and again, into buffers that were allocated once.

        For timing: nothing but the model's own work is left in the call. It runs once here.

        Raises:
            InputError: as `run`.
        """
        return _Repeatable(self._session, {**self.run(feeds), **feeds})


class _Repeatable:
    """A session with its inputs and outputs bound to arrays, which it keeps alive."""

    def __init__(self, session: onnxruntime.InferenceSession, arrays: Mapping[str, Array]) -> None:
        # onnxruntime writes into the memory of these arrays and holds no reference to them.
        self._values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"))
            for name, array in arrays.items()
        }
        self._run = session.run_with_iobinding
        self._binding = session.io_binding()
        for argument in session.get_inputs():
            self._binding.bind_ortvalue_input(argument.name, self._values[argument.name])
        for argument in session.get_outputs():
            self._binding.bind_ortvalue_output(argument.name, self._values[argument.name])

    def __call__(self) -> None:
        self._run(self._binding)


def open_session(
    model: bytes | str,
    options: onnxruntime.SessionOptions,
    *,
    providers: Sequence[Any] | None = None,
    disabled_optimizers: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Open a serialised model, or the file at a path; on the CPU unless ``providers`` says otherwise.

    Raises:
        TargetError: onnxruntime rejects the model.
    """
    try:
        return onnxruntime.InferenceSession(
            model,
            options,
            providers=list(providers or ["CPUExecutionProvider"]),
            disabled_optimizers=list(disabled_optimizers),
        )
    except Exception as error:
        name = model if isinstance(model, str) else "the model"
        raise TargetError(
            f"onnxruntime {onnxruntime.__version__} cannot load {name}: {first_line(error)}",
            hint="`planish inspect` lists its ops; an op this onnxruntime lacks needs another target",
        ) from error


def run_session(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> dict[str, Any]:
    """Run once; arrays in, arrays out (a list of arrays for a sequence output), by name.

    Raises:
        InputError: an input is missing, unknown or of the wrong type, or onnxruntime fails on it.
    """
    check_feeds(session.get_inputs(), feeds)
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, dict(feeds))
    except Exception as error:
        raise InputError(f"onnxruntime could not run the model: {first_line(error)}") from error
    return dict(zip(names, values, strict=True))


def check_feeds(inputs: Sequence[Any], feeds: Mapping[str, Array]) -> None:
    """Compare feeds with a session's declared inputs; raise `InputError` with the first difference."""
    expected = {argument.name: argument for argument in inputs}
    unknown = sorted(set(feeds) - set(expected))
    missing = sorted(set(expected) - set(feeds))
    if unknown or missing:
        raise InputError(
            f"inputs do not match the model: expected {sorted(expected)}, found {sorted(feeds)}"
            + (f"; missing {missing}" if missing else "")
            + (f"; unknown {unknown}" if unknown else "")
        )
    for name, argument in expected.items():
        if argument.type.startswith("seq("):  # a list, which onnxruntime checks
            continue
        array = np.asarray(feeds[name])
        dtype = _NUMPY_DTYPES.get(argument.type)
        if dtype is not None and array.dtype != dtype:
            raise InputError(
                f"input {name!r}: expected dtype {dtype}, found {array.dtype}",
                hint=f"convert it with .astype('{dtype}')",
            )
        if argument.shape is not None and len(argument.shape) != array.ndim:
            raise InputError(f"input {name!r}: expected shape {argument.shape}, found {list(array.shape)}")
        for axis, (want, have) in enumerate(zip(argument.shape or (), array.shape, strict=False)):
            if isinstance(want, int) and want != have:
                raise InputError(
                    f"input {name!r}: expected {want} on axis {axis} of shape {argument.shape}, found {have}"
                )


_NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype("float32"),
    "tensor(double)": np.dtype("float64"),
    "tensor(float16)": np.dtype("float16"),
    "tensor(bool)": np.dtype("bool"),
    **{f"tensor({name})": np.dtype(name) for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64")},
}


def as_tensor(value: onnxruntime.OrtValue) -> torch.Tensor:
    """A value's own memory as a tensor."""
    tensor = torch.utils.dlpack.from_dlpack(value._get_c_value())
    # DLPack as onnxruntime writes it has no boolean type and hands over the bytes.
    return tensor.view(torch.bool) if value.data_type() == "tensor(bool)" else tensor


def serialize_sharing_weights(
    model: ir.Model, options: onnxruntime.SessionOptions, *, in_place: bool = False
) -> tuple[bytes, dict[str, onnxruntime.OrtValue]]:
    """The graph as bytes with placeholders for its large weights, which ``options`` are given instead.

    Args:
        model: not changed.
        options: of the session that is opened next.
        in_place: have weights read where they are, if `is_read_in_place`.

    Returns:
        the bytes, and those weights by name; if any is read in place, they have to live as long as the
        session, and all until it is open.
    """
    shell = clone(model)
    weights: dict[str, onnxruntime.OrtValue] = {}
    for name, value in shell.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not _goes_beside(tensor):
            continue
        array = np.asarray(tensor.numpy(), order="C")
        weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        if in_place and is_read_in_place(value):
            options.add_initializer(name, weights[name])
        value.const_value = ir.ExternalTensor(
            _PLACEHOLDER_FILE, 0, array.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name
        )
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    return ir.serde.serialize_model(shell).SerializeToString(), weights


def is_read_in_place(weight: ir.Value) -> bool:
    """Whether onnxruntime makes no copy of a weight: only kernels of its own domain read it."""
    tensor, readers = weight.const_value, weight.consumers()
    beside = tensor is not None and _goes_beside(tensor)
    return beside and bool(readers) and all(node.domain == CONTRIB for node in readers)


def _goes_beside(tensor: ir.TensorProtocol) -> bool:
    """Whether a weight is handed to onnxruntime as an array, and not in the graph."""
    return tensor.nbytes >= _SMALL_TENSOR_BYTES and tensor.dtype in _SHARABLE


# numpy's own types: onnxruntime takes their buffers as they are.
_SHARABLE = frozenset(ir.DataType.from_numpy(dtype) for dtype in _NUMPY_DTYPES.values())


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its class where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
