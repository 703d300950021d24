"""What quantising a group of layers gave, as arrays that `planish.runtime.work_cache` keeps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..infrastructure.base import LayerErrors
from .activations import Activations
from .linear_layers import LowRank
from .quantized_weight import Outliers, QuantizedWeight, SecondLevel

Array = npt.NDArray[Any]
_FACTS = "facts"
_GRIDS = ("scale_scale", "scale_zero", "zero_scale", "zero_zero")


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """Of one layer.

    Attributes:
        weight: quantised.
        low_rank: the residual beside it.
        errors: of the layer.
        activations: with the static grid that was found; None for float.
    """

    weight: QuantizedWeight
    low_rank: LowRank | None
    errors: LayerErrors
    activations: Activations | None


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """Of layers that share their input.

    Attributes:
        layers: in their order.
        remarks: what was said about them.
    """

    layers: Sequence[LayerResult]
    remarks: Sequence[tuple[str, str]]

    def arrays(self) -> dict[str, Array]:
        """Everything, by name."""
        facts: dict[str, Any] = {"remarks": list(self.remarks), "layers": []}
        arrays: dict[str, Array] = {}
        for index, layer in enumerate(self.layers):
            facts["layers"].append(_facts(layer))
            arrays |= {f"{index}.{name}": array for name, array in _arrays(layer).items()}
        arrays[_FACTS] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        return arrays

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> GroupResult:
        """What `arrays` gave."""
        facts = json.loads(arrays[_FACTS].tobytes())
        layers = [
            _layer(
                found,
                {
                    name.removeprefix(f"{index}."): array
                    for name, array in arrays.items()
                    if name.startswith(f"{index}.")
                },
            )
            for index, found in enumerate(facts["layers"])
        ]
        return cls(layers, [(subject, text) for subject, text in facts["remarks"]])


def _facts(layer: LayerResult) -> dict[str, Any]:
    level = layer.weight.second_level
    return {
        "bits": layer.weight.bits,
        "second_level": None if level is None else [level.bits, level.block_size],
        "errors": dataclasses.asdict(layer.errors),
        "activations": None if layer.activations is None else dataclasses.asdict(layer.activations),
    }


def _arrays(layer: LayerResult) -> dict[str, Array]:
    weight = layer.weight
    # Stored by columns where they are, so that the model that comes of it has the same bytes.
    by_columns = weight.integers.flags.f_contiguous and not weight.integers.flags.c_contiguous
    found: dict[str, Array | None] = {
        "integers_by_columns" if by_columns else "integers": weight.integers.T
        if by_columns
        else weight.integers,
        "scale": weight.scale,
        "zero_point": weight.zero_point,
        "codebook": weight.codebook,
    }
    if weight.second_level is not None:
        found |= {name: getattr(weight.second_level, name) for name in _GRIDS}
    if weight.outliers is not None:
        found |= {"positions": weight.outliers.positions, "values": weight.outliers.values}
    if layer.low_rank is not None:
        found |= {"down": layer.low_rank[0], "up": layer.low_rank[1]}
    return {name: array for name, array in found.items() if array is not None}


def _layer(facts: Mapping[str, Any], arrays: Mapping[str, Array]) -> LayerResult:
    level = facts["second_level"]
    weight = QuantizedWeight(
        arrays["integers"] if "integers" in arrays else arrays["integers_by_columns"].T,
        arrays["scale"],
        arrays.get("zero_point"),
        facts["bits"],
        arrays.get("codebook"),
        None
        if level is None
        else SecondLevel(**{name: arrays[name] for name in _GRIDS}, bits=level[0], block_size=level[1]),
        Outliers(arrays["positions"], arrays["values"]) if "positions" in arrays else None,
    )
    return LayerResult(
        weight,
        (arrays["down"], arrays["up"]) if "down" in arrays else None,
        LayerErrors(**facts["errors"]),
        None if facts["activations"] is None else Activations(**facts["activations"]),
    )
