"""Did a rotation help? Quantisation errors before and after it, and what its online transforms cost.

    weights:      ‖W − Ŵ‖ / ‖W‖ with every weight rounded to the nearest point of the scheme's grid
    activations:  ‖x − x̂‖ / ‖x‖ of what linears read, with one scale per token, over the calibration data
    both:         √(weights² + activations²), to first order the relative error of the layer's output

Activations are measured in the model as it comes: a rotation of x is applied to what was recorded.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from ...codegen.target import Target
from ...ir import ops, release
from ...ir.views import linears
from ..quantize.scheme import Scheme
from ..quantize.streamed import rounding_error
from .change import Change, Online
from .probes import Effect, Probe


@dataclasses.dataclass
class Verdict:
    """What one rotation does.

    Attributes:
        weights: the errors of linears' weights, by the linear's name.
        inputs: the errors of what linears read, by the linear's name; of keys, by ``keys of …k_proj``.
        cost: time of the online transforms over that of the linears beside them; None if not known.
    """

    weights: dict[str, Effect] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Effect] = dataclasses.field(default_factory=dict)
    cost: float | None = None

    @property
    def total(self) -> Effect | None:
        """The mean over layers of both errors together; None if nothing was measured."""
        layers = dict.fromkeys((*self.weights, *self.inputs))
        if not layers:
            return None
        both = np.array(
            [[self._errors(self.weights, name), self._errors(self.inputs, name)] for name in layers]
        )
        before, after = np.linalg.norm(both, axis=1).mean(axis=0)
        return Effect(float(before), float(after))

    @staticmethod
    def _errors(effects: Mapping[str, Effect], name: str) -> tuple[float, float]:
        effect = effects.get(name)
        return (0.0, 0.0) if effect is None else (effect.before, effect.after)

    def reason_to_drop(self, max_cost: float) -> str | None:
        """Why the rotation does not pay; None if it does."""
        total = self.total
        if total is None:
            return "no calibration data to tell whether it pays"
        if total.after >= total.before:
            return "the error does not fall"
        if self.cost is not None and self.cost > max_cost:
            return f"its transforms take more than {max_cost:.0%} of the linears' time"
        return None

    def __str__(self) -> str:
        parts = [f"mean error {self.total}"] if self.total is not None else ["error not measured"]
        if self.cost is not None:
            parts.append(f"online transforms take {self.cost:.1%} of the linears' time")
        return "; ".join(parts)


class Judge:
    """Measures rotations of one model while, or before, they are made.

    Args:
        model: not changed.
        scheme: what weights are rounded to.
        target: where the online transforms would run.
        probes: what was recorded of the activations, by `Change.label`.
    """

    def __init__(
        self, model: ir.Model, scheme: Scheme, target: Target, probes: Mapping[str, Sequence[Probe]]
    ) -> None:
        self._names = {linear.weight: linear.name for linear in linears(model)}
        self._scheme, self._target, self._probes = scheme, target, probes

    def watch(self, change: Change, verdict: Verdict) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
        """The constants that ``change`` makes, noting in ``verdict`` what each does to the errors."""
        for probe in self._probes.get(change.label, ()):
            verdict.inputs.update(dict.fromkeys(probe.names, probe.effect))
        verdict.cost = self._cost(change)
        for value, tensor in change.tensors():
            name = self._names.get(value)
            if name is not None and value.const_value is not None:
                effect = Effect(self._weight_error(value.const_value), self._weight_error(tensor))
                verdict.weights[name] = effect
            yield value, tensor

    def _weight_error(self, tensor: ir.TensorProtocol) -> float:
        """Of a weight rounded to nearest; in one group per channel where the group size does not divide."""
        weight, scheme = tensor.numpy(), self._scheme
        if scheme.group_size > 0 and len(weight) % scheme.group_size:
            scheme = dataclasses.replace(scheme, group_size=-1)
        grid = scheme.grid(ir.DataType.FLOAT, clip=False, limit_pairs=False)
        error = rounding_error(weight, grid, name=str(tensor.name))
        release(tensor)
        return error

    def _cost(self, change: Change) -> float | None:
        transforms = [self._seconds(online) for online in change.online]
        beside = [self._target.seconds(node) for node in change.beside]
        if not transforms or None in transforms or not beside or None in beside:
            return None
        return sum(filter(None, transforms)) / sum(filter(None, beside))

    def _seconds(self, online: Online) -> float | None:
        x = online.input
        if x.dtype is None:
            return None
        factors = ops.factor_values(online.transform.factors, "cost", x.dtype)
        node, _ = ops.hadamard_transform(x, factors, trailing=online.trailing)
        taken = self._target.seconds(node)
        # The node was only there to be timed: it must not stay among the readers of x.
        node.replace_input_with(0, None)
        return taken


def layer_remarks(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str, bool]]:
    """For every layer: its name, its errors before all and after all rotations, whether they fell."""
    layers: dict[str, list[Verdict]] = collections.defaultdict(list)
    for verdict in verdicts:
        for name in dict.fromkeys((*verdict.weights, *verdict.inputs)):
            layers[name].append(verdict)
    for name, those in layers.items():
        weights = [verdict.weights[name] for verdict in those if name in verdict.weights]
        inputs = [verdict.inputs[name] for verdict in those if name in verdict.inputs]
        effects = {"weight": weights, "activation": inputs}
        whole = {kind: Effect(found[0].before, found[-1].after) for kind, found in effects.items() if found}
        before = float(np.linalg.norm([effect.before for effect in whole.values()]))
        after = float(np.linalg.norm([effect.after for effect in whole.values()]))
        text = ", ".join(f"{kind} error {effect}" for kind, effect in whole.items())
        yield name, text, after < before
