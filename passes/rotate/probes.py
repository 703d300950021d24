"""The quantisation error of activations, as they are and rotated, over the calibration data.

    ‖x − x̂‖ / ‖x‖, x̂ = round(x / s) · s, s = max|x| / (2^(bits−1) − 1) for each token

One run of the model as it comes: rotations are applied to what was recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.views.values import static_dim
from ..infrastructure.base import PassContext
from .change import Change
from .vectors import VectorFunction

KEY_BITS = 4
"""Of cached keys, per token and head, by which R3 is judged."""


@dataclasses.dataclass(frozen=True)
class Effect:
    """A relative error before and after."""

    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.before:.3g} → {self.after:.3g}"


@dataclasses.dataclass
class Probe:
    """What is recorded of one activation.

    Attributes:
        value: the activation [..., n · size].
        names: the linears that read it, or whose keys it holds.
        functions: the rotation of its vectors, step by step.
        size: the length of a vector with a scale of its own.
        bits: of the symmetric grid.
    """

    value: ir.Value
    names: list[str]
    functions: tuple[VectorFunction, ...]
    size: int
    bits: int
    _sums: npt.NDArray[np.float64] = dataclasses.field(default_factory=lambda: np.zeros(3))

    @property
    def effect(self) -> Effect:
        """The error over everything recorded."""
        signal, before, after = self._sums
        if not signal:
            return Effect(0.0, 0.0)
        return Effect(float(np.sqrt(before / signal)), float(np.sqrt(after / signal)))

    def record(self, rows: npt.NDArray[np.float32]) -> None:
        """Take further vectors [tokens, size] into account."""
        vectors = rows.astype(np.float64)
        rotated = vectors
        for function in self.functions:
            rotated = function(rotated)
        # A transform whose 1/√n is rounded changes lengths a little: errors count relative to the length.
        length = np.square(vectors).sum()
        gain = np.square(rotated).sum() / length if length else 1.0
        self._sums += length, _squared_error(vectors, self.bits), _squared_error(rotated, self.bits) / gain


def _squared_error(vectors: npt.NDArray[np.float64], bits: int) -> float:
    highest = 2 ** (bits - 1) - 1
    scale = np.abs(vectors).max(axis=1, keepdims=True, initial=0) / highest
    scale[scale == 0] = 1
    return float(np.square(vectors - np.rint(vectors / scale) * scale).sum())


def record_probes(
    model: ir.Model, changes: Sequence[Change], activation_bits: int | None, ctx: PassContext
) -> dict[str, list[Probe]]:
    """What the calibration data says about every change, by its label; nothing without calibration data.

    Args:
        model: not changed, and not yet rotated.
        changes: the rotations to be judged.
        activation_bits: of what linears read; None if it stays float and only keys are of interest.
        ctx: has the calibration data.
    """
    if not ctx.calibration:
        return {}
    probes = {change.label: _probes_of(change, activation_bits) for change in changes}
    by_value: dict[ir.Value, list[Probe]] = {}
    for probe in (probe for some in probes.values() for probe in some):
        by_value.setdefault(probe.value, []).append(probe)
    position = {value: index for index, node in enumerate(model.graph) for value in node.outputs}
    stream = ctx.activation_stream(model)
    values = sorted(by_value, key=lambda value: position.get(value, -1))
    for value in ctx.progress(values, "record activations"):
        for tap in stream.advance([value]):
            for probe in by_value[value]:
                rows = tap.rows(value) if probe.size == static_dim(value, -1) else tap.array(value)
                probe.record(rows.reshape(-1, probe.size))
    return probes


def _probes_of(change: Change, activation_bits: int | None) -> list[Probe]:
    if change.rotation == "R3":
        keys = change.online[1]
        transform = keys.transform
        return [
            Probe(keys.input, [f"keys of {change.name}"], (transform.apply,), transform.features, KEY_BITS)
        ]
    found: dict[ir.Value, Probe] = {}
    steps: dict[ir.Node, list[VectorFunction]] = {}
    for edit in change.edits if activation_bits is not None else ():
        for vector in edit.vectors if edit.reads else ():
            steps.setdefault(vector.node, []).append(edit.function)
    for node, functions in steps.items():
        value, weight = node.inputs[0], node.inputs[1]
        size = static_dim(value, -1)
        if value is None or weight is None or size is None or activation_bits is None:
            continue
        name = str(weight.name).removesuffix(".weight")
        if value in found:
            found[value].names.append(name)
        else:
            found[value] = Probe(value, [name], tuple(functions), size, activation_bits)
    return list(found.values())
