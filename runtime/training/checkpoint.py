"""Checkpoints of a training run: all that it needs in order to go on as if it had not been interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ...ir import release
from ...ir.errors import PassError
from ...ir.files import making
from ..calibration.data import Feeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a run after some updates.

    Attributes:
        step: how many updates were made.
        parameters: the weights by name.
        optimizer: the optimiser's ``state_dict()``; None at the end of the run.
        hook: the hook's state.
        before: the losses on the held-out batches before the first update, by name.
    """

    step: int
    parameters: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any] | None
    hook: Mapping[str, torch.Tensor]
    before: Mapping[str, float]


class CheckpointFile:
    """The place of one run's checkpoint.

    Args:
        folder: exists.
        key: what tells this run from others; a run with another key has another file.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"training-{key}.pt"

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint in place of the last one; an interruption leaves the last one."""
        fields = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
        fields["parameters"] = {name: tensor.detach() for name, tensor in checkpoint.parameters.items()}
        with making(self._path) as (partial,):
            torch.save(fields, partial)

    def load(self) -> Checkpoint | None:
        """The last checkpoint; None if there is none.

        Raises:
            PassError: the file is damaged.
        """
        if not self._path.exists():
            return None
        try:
            return Checkpoint(**torch.load(self._path, weights_only=True))
        except (RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
            raise PassError(
                f"the checkpoint {self._path} cannot be read", hint="delete it to train from the beginning"
            ) from error


def fingerprint(models: Sequence[ir.Model], data: Sequence[Feeds], *settings: object) -> str:
    """A short hash of all that decides what training gives: graphs, weights, data and settings.

    Args:
        models: nodes, initializers and inputs count; metadata does not.
        data: the batches.
        settings: whatever else, as their ``repr``.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for model in models:
        for node in model.graph.all_nodes():
            digest.update(_text_of(node).encode())
        for name, value in model.graph.initializers.items():
            if value.const_value is not None:
                digest.update(name.encode())
                _add_tensor(digest, value.const_value)
    for feeds in data:
        for name, array in feeds.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _text_of(node: ir.Node) -> str:
    operands = [None if value is None else value.name for value in node.inputs]
    results = [value.name for value in node.outputs]
    attributes = [(name, _value_of(attribute)) for name, attribute in sorted(node.attributes.items())]
    return f"{node.domain}:{node.op_type}{operands}{results}{attributes};"


def _value_of(attribute: ir.Attr) -> object:
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().tobytes()
    # The nodes of a subgraph are told by themselves.
    is_graph = attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return None if is_graph else attribute.value


def _add_tensor(digest: Any, tensor: ir.TensorProtocol) -> None:
    digest.update(f"{tensor.dtype.name} {list(tensor.shape)} ".encode())
    digest.update(tensor.tobytes())
    release(tensor)
