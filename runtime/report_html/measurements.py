"""What a report measures when it is written: how far the outputs moved, and how long the model takes here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...codegen.machine import fingerprint
from ...codegen.target import BoundModel
from ...ir import load
from ...ir.outline import ModelOutline
from ..calibration.data import fitted
from ..layer_times import LayerTime, by_layer, node_times
from ..measure import Difference, Latency, compare_outputs, interleaved_latency
from ..session import Session

Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured on one set of inputs, with onnxruntime on the processor.

    Attributes:
        shapes: of the inputs, by name.
        machine: what it was measured on.
        errors: by output, how far the file is from the model before; empty without one.
        latencies: of the file (``after``) and of the model ``before``, timed in turns; may be empty.
        layers: what every layer takes, and every op outside of layers; may be empty.
    """

    shapes: Mapping[str, tuple[int, ...]]
    machine: str
    errors: Mapping[str, Difference]
    latencies: Mapping[str, Latency]
    layers: Sequence[LayerTime]


def measure(
    path: Path,
    bound: BoundModel,
    after: ModelOutline | None,
    *,
    before: Path | None,
    feeds: Feeds,
    latency: bool,
) -> Measurements:
    """Run a compiled file, and the model that it was compiled from, if there is one.

    Args:
        path: the file.
        bound: what is in it.
        after: its outline, which says what belongs to which layer.
        before: the model to compare with.
        feeds: inputs; of the model before, if there is one.
        latency: time them, and every layer of the file.

    Raises:
        InputError: the inputs do not fit, or the models have no output in common.
        TargetError: onnxruntime cannot run one of them.
    """
    own = fitted(feeds, bound.model)
    runs = {"after": functools.partial(Session(bound).run, own)}
    if before is not None:
        runs["before"] = functools.partial(Session(load(before)).run, feeds)
    layers: Sequence[LayerTime] = ()
    if latency:
        names = {} if after is None else {layer.node: layer.name for layer in after.layers}
        layers = by_layer(node_times(path, own, bound.session_options), names)
    return Measurements(
        shapes={name: array.shape for name, array in feeds.items()},
        machine=fingerprint().rpartition(" ")[0],
        errors={} if before is None else compare_outputs(runs["after"](), runs["before"]()),
        latencies=interleaved_latency(runs, repeats=24) if latency else {},
        layers=layers,
    )
