"""What `planish.compile` returns: a model that runs, and that knows how it came to be."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch

from ..codegen.target import BoundModel, Target
from ..ir import save
from ..ir.errors import InputError
from ..ir.signature import Signature, flatten_inputs, unflatten_outputs
from .measure import Difference, Latency, compare_outputs, interleaved_latency
from .session import Session

Array = np.ndarray[Any, Any]


class Report(Protocol):
    """What the compiler says about what it did; `rich` prints it, `as_dict` is for programs."""

    def __rich__(self) -> Any:
        """A rich renderable: one row per pass."""

    def as_dict(self, *, costs: bool = True) -> dict[str, Any]:
        """JSON-serialisable form; ``costs=False`` leaves time and memory out."""


class CompiledModel:
    """A compiled model. Call it like the module that it came from, or with arrays through `run`.

    Attributes:
        model: the graph after the passes, in the IR (compressed ops are ``planish`` functions).
        bound: the same graph bound to the target's kernels; what `run` executes and `save` writes.
        target: where it runs.
        report: what each pass covered, skipped, changed and cost.
        signature: how to call it like the traced module; None for models that came from ONNX.
        alternatives: further results of the same compilation by their labels, such as ``1.5x``.
    """

    def __init__(
        self,
        *,
        model: ir.Model,
        bound: BoundModel,
        target: Target,
        report: Report,
        signature: Signature | None = None,
    ) -> None:
        self.model = model
        self.bound = bound
        self.target = target
        self.report = report
        self.signature = signature
        self.alternatives: Mapping[str, CompiledModel] = {}

    @functools.cached_property
    def session(self) -> Session:
        """The onnxruntime session, created at the first use."""
        return Session(self.bound, target=self.target)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph inputs, in order."""
        return tuple(value.name or "" for value in self.bound.model.graph.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph outputs, in order."""
        return tuple(value.name or "" for value in self.bound.model.graph.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays. Keys are graph-input names, dtypes and ranks as the graph declares them.

        Raises:
            InputError: an input is missing, unknown, or of the wrong dtype or shape.
        """
        return self.session.run(feeds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it as the module was called: tensors in, the module's own output structure out.

        A model that came from ONNX has no module: positional tensors are its graph inputs in order,
        keyword tensors go by name, and a dict of tensors by output name comes back.
        """
        if self.signature is not None:
            tensors: Mapping[str, torch.Tensor] = flatten_inputs(self.signature, args, kwargs)
        else:
            tensors = self._name_arguments(args, kwargs)
        feeds = {name: torch.as_tensor(tensor).detach().cpu().numpy() for name, tensor in tensors.items()}
        outputs = self.session.run_torch(feeds)
        if self.signature is None:
            return outputs
        return unflatten_outputs(self.signature, list(outputs.values()))

    def _name_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.input_names):
            raise InputError(
                f"expected at most {len(self.input_names)} inputs {list(self.input_names)}, found {len(args)}"
            )
        return {**dict(zip(self.input_names, args, strict=False)), **kwargs}

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> Path:
        """Write the bound model as one ONNX file (and ``path.data`` for weights over 2 GB, or on request).

        The files appear whole or not at all.

        Returns:
            The path of the ONNX file.
        """
        save(self.bound.model, path, external_data=external_data)
        return Path(path)

    def benchmark(
        self, feeds: Mapping[str, Array], *, against: CompiledModel | None = None, repeats: int = 20
    ) -> dict[str, Latency]:
        """Latency of one call on these inputs; interleaved with ``against`` when given.

        Returns:
            ``{"model": …}``, and ``"against"`` beside it: medians over ``repeats`` calls, in milliseconds.
        """
        runs = {"model": functools.partial(self.session.run_torch, feeds)}
        if against is not None:
            runs["against"] = functools.partial(against.session.run_torch, feeds)
        return interleaved_latency(runs, repeats=repeats)

    def compare(self, other: Any, inputs: Mapping[str, Array]) -> dict[str, Difference]:
        """How far this model's outputs are from another's on the same inputs, by output name.

        Args:
            other: a `CompiledModel`, or any callable from feeds to a mapping of outputs (the reference).
            inputs: arrays by graph-input name.
        """
        reference = other.run(inputs) if isinstance(other, CompiledModel) else other(inputs)
        return compare_outputs(self.run(inputs), reference)
