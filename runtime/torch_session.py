"""Running a graph with torch: the calls of a session of onnxruntime, and tensors that stay tensors."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..codegen.target import BoundModel
from ..codegen.torch_fx import INPUTS_KEY
from ..codegen.torch_fx.target import Torch
from ..codegen.torch_fx.tensors import from_array
from ..ir.errors import InputError
from .session import check_feeds, first_line
from .torch_step import TorchStep

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Argument:
    """An input or output of the graph, as onnxruntime describes its own.

    Attributes:
        name: of the value.
        type: such as ``tensor(float)``.
        shape: numbers, names of free sizes, and None for nameless ones; None if not even the rank is known.
    """

    name: str
    type: str
    shape: list[int | str | None] | None

    @classmethod
    def of(cls, value: ir.Value) -> Argument:
        """Of a value of the graph."""
        kind = "" if value.dtype is None else _TYPES.get(value.dtype, value.dtype.name.lower())
        shape = None
        if value.shape is not None:
            shape = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        return cls(str(value.name), f"tensor({kind})", shape)


_TYPES = {ir.DataType.FLOAT: "float", ir.DataType.DOUBLE: "double"}


class TorchValue:
    """A tensor with the face of an `onnxruntime.OrtValue`, as caches hold them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def numpy(self) -> Array:
        """In memory of the CPU; bfloat16, which numpy has not, as float32."""
        tensor = self.tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def shape(self) -> list[int]:
        """Of the tensor."""
        return list(self.tensor.shape)


class TorchSession:
    """A bound model as a torch module.

    Args:
        bound: the model as its target bound it.
        target: says device and precision.

    Attributes:
        module: computes it.

    Raises:
        TargetError: the model cannot be lowered.
    """

    def __init__(self, bound: BoundModel, target: Torch) -> None:
        self.module = target.module(bound)
        self._device, self._dtype = torch.device(target.device), target.dtype
        self._step_module = target.decode_step(bound, self.module)
        self._arguments: Mapping[str, str] = self.module.meta[INPUTS_KEY]
        graph = bound.model.graph
        self.inputs = tuple(Argument.of(value) for value in graph.inputs if value.name in self._arguments)
        self.outputs = tuple(Argument.of(value) for value in graph.outputs)
        self.output_names = tuple(argument.name for argument in self.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Arrays in, arrays out, by graph-input and graph-output name.

        Raises:
            InputError: an input is missing, unknown, or has the wrong dtype or rank, or torch fails.
        """
        check_feeds(self.inputs, feeds)
        return {name: value.numpy() for name, value in self.run_values(feeds).items()}

    def run_torch(self, feeds: Mapping[str, Array | torch.Tensor]) -> dict[str, torch.Tensor]:
        """Like `run`, with tensors on the target's device, and gradients; tensors may be given, too."""
        tensors = {name: self._tensor(value) for name, value in feeds.items()}
        if tensors.keys() != self._arguments.keys():
            raise InputError(
                f"inputs do not match the model: expected {list(self._arguments)}, found {list(tensors)}"
            )
        with _named(tensors):
            outputs: dict[str, torch.Tensor] = self.module(
                **{self._arguments[name]: tensor for name, tensor in tensors.items()}
            )
        return outputs

    def value(self, array: Array) -> TorchValue:
        """An array on the device, and in the module's precision, so that it can be written in place."""
        tensor = self._tensor(array)
        return TorchValue(tensor.to(self._dtype) if tensor.is_floating_point() and self._dtype else tensor)

    def run_values(self, given: Mapping[str, Array | TorchValue]) -> dict[str, TorchValue]:
        """Run once without gradients; arrays and values in, values out."""
        feeds = {
            name: value.tensor if isinstance(value, TorchValue) else value for name, value in given.items()
        }
        with torch.no_grad():
            return {name: TorchValue(tensor) for name, tensor in self.run_torch(feeds).items()}

    def step(self, caches: Mapping[str, TorchValue], tokens: Mapping[str, Array]) -> TorchStep | None:
        """What runs one token after the other on these caches; None where the target has no such thing.

        Args:
            caches: by name of the past, of one length; written as long as the step is used.
            tokens: the other inputs of the first token.
        """
        lengths = {value.tensor.shape[2] for value in caches.values()}
        if self._step_module is None or len(lengths) > 1:
            return None
        tensors = {name: value.tensor for name, value in caches.items()}
        given = {name: self._tensor(array) for name, array in tokens.items()}
        with _named({**tensors, **given}):
            return TorchStep(self._step_module, tensors, given)

    def run_step(self, step: TorchStep, tokens: Mapping[str, Array]) -> dict[str, TorchValue]:
        """Run the next token; its outputs are overwritten by the one after it."""
        given = {name: self._tensor(array) for name, array in tokens.items()}
        with _named(given):
            outputs = step.run(given)
        return {name: TorchValue(tensor) for name, tensor in outputs.items()}

    def repeatable(self, feeds: Mapping[str, Array]) -> Callable[[], None]:
        """A call that runs on these feeds again and again, and waits for the device. It runs once here."""
        tensors = {name: self._tensor(value) for name, value in feeds.items()}

        def run() -> None:
            with torch.no_grad():
                self.run_torch(tensors)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        run()
        return run

    def _tensor(self, value: Array | torch.Tensor) -> torch.Tensor:
        tensor = value if isinstance(value, torch.Tensor) else from_array(np.asarray(value))
        return tensor.to(self._device)


@contextlib.contextmanager
def _named(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Say what torch was run on where it fails."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise InputError(f"torch could not run the model on inputs {shapes}: {first_line(error)}") from error
