"""What the nodes of an ONNX file take by onnxruntime's profiler, and which layers they belong to."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from .session import open_session, run_session

Array = np.ndarray[Any, Any]

_SUFFIX = "_kernel_time"


@dataclasses.dataclass(frozen=True)
class NodeTime:
    """What one node takes.

    Attributes:
        node: its name, as onnxruntime's graph optimisations left it.
        op: its op.
        ms: median of the counted runs, in milliseconds.
    """

    node: str
    op: str
    ms: float


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """What the nodes of one layer take together, or all nodes of one op that belong to no layer.

    Attributes:
        name: of the layer, or of the op.
        kernels: the ops that ran, in order.
        nodes: how many they are.
        ms: of all of them, in milliseconds.
        is_layer: it is a layer, and not an op.
    """

    name: str
    kernels: tuple[str, ...]
    nodes: int
    ms: float
    is_layer: bool


def node_times(
    path: str | os.PathLike[str],
    feeds: Mapping[str, Array],
    session_options: Mapping[str, str],
    *,
    repeats: int = 20,
    warmup: int = 3,
) -> list[NodeTime]:
    """Profile a file as onnxruntime runs it; the nodes come in the order in which they ran.

    Args:
        path: the file.
        feeds: inputs by graph-input name.
        session_options: entries of onnxruntime's session configuration.
        repeats: counted runs.
        warmup: uncounted runs before them.

    Raises:
        TargetError: onnxruntime rejects the file.
        InputError: the feeds do not fit it.
    """
    with tempfile.TemporaryDirectory(prefix="planish-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        for key, value in session_options.items():
            options.add_session_config_entry(key, value)
        session = open_session(str(path), options)
        for _ in range(warmup + repeats):
            run_session(session, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            node = event["name"].removesuffix(_SUFFIX)
            durations[node, event["args"]["op_name"]].append(event["dur"] / 1e3)
    return [NodeTime(*key, _median(found, warmup, repeats)) for key, found in durations.items()]


def _median(durations: Sequence[float], warmup: int, repeats: int) -> float:
    """Of the counted runs; a name that several nodes share comes several times in each run."""
    nodes = max(1, len(durations) // (warmup + repeats))
    counted = np.array(durations[warmup * nodes :][: repeats * nodes]).reshape(-1, nodes)
    return float(statistics.median(counted.sum(axis=1)))


def by_layer(times: Iterable[NodeTime], layers: Mapping[str, str]) -> list[LayerTime]:
    """Sum the times of nodes that belong to one layer, and those of the others by their op.

    Args:
        times: of all nodes.
        layers: names of layers by the names of their nodes before these were bound to kernels. Kernels that
            take several nodes are named after the one that they replace: ``node``, ``node.MatMul.1``, ….
    """
    groups: dict[tuple[str, bool], list[NodeTime]] = collections.defaultdict(list)
    for time in times:
        layer = _layer_of(time.node, layers)
        groups[(time.op, False) if layer is None else (layer, True)].append(time)
    return [
        LayerTime(
            name=name,
            kernels=tuple(dict.fromkeys(time.op for time in found)),
            nodes=len(found),
            ms=sum(time.ms for time in found),
            is_layer=is_layer,
        )
        for (name, is_layer), found in groups.items()
    ]


def _layer_of(node: str, layers: Mapping[str, str]) -> str | None:
    """The layer of the node that this one's name begins with; onnxruntime appends /… to what it fuses."""
    while node not in layers:
        end = max(node.rfind("."), node.rfind("/"))
        if end < 0:
            return None
        node = node[:end]
    return layers[node]
