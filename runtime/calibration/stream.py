"""Running a graph piece by piece on all calibration samples, with whatever was rewritten on the way.

The values that a piece hands to the next ones are kept for every sample: along a transformer this is the
residual stream and what the next linear reads. So a model of any depth needs the activations of one boundary,
and every node is run once per sample: linears *after* they were rewritten, because a piece ends at their
inputs. What is quick to compute from the graph's inputs alone (masks, positions, embeddings) is computed
again where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from ...ir.errors import InputError
from ...ir.external import release
from ...ir.walk import values_read
from ..session import open_session, run_session, serialize_sharing_weights
from .data import CalibrationData, Feeds, token_mask

Array = npt.NDArray[Any]

_HEAVY = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "LSTM", "GRU", "Scan"})
_DEQUANTIZE_ONCE = {"session.disable_quant_qdq": "1"}
"""onnxruntime folds weights instead of using kernels that quantise activations: a node means its body."""


class Tap:
    """The values that one sample has at the end of a piece."""

    def __init__(self, feeds: Feeds, values: Mapping[str, Array]) -> None:
        self._mask = token_mask(feeds)
        self._values = values

    def array(self, value: ir.Value | str) -> Array:
        """The value as it is, such as [batch, sequence, features]."""
        return self._values[_name(value)]

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens are real, [batch, sequence]; None if all are."""
        return self._mask

    def rows(self, value: ir.Value | str, *, skip: int = 0) -> npt.NDArray[np.float32]:
        """The value as float32 rows [tokens, features], without padding and the first tokens to skip."""
        array = self.array(value)
        rows = array.reshape(-1, array.shape[-1])
        mask = self._mask
        if skip:
            mask = np.ones(array.shape[:2], bool) if mask is None else mask
            mask = mask & (mask.cumsum(axis=1) > skip)
        if mask is not None and mask.size == len(rows):
            rows = rows[mask.reshape(-1)]
        return rows.astype(np.float32, copy=False)


class ActivationStream:
    """A position in the run of a model on all samples; `advance` moves it on.

    Nodes that were not run yet may be rewritten between two calls, provided that values keep their names.

    Args:
        model: run as it is at each call; not changed.
        data: the samples.
        releases_weights: drop each weight from the model once all its readers were run: for a copy of a
            model that is only there to be run once.

    Raises:
        InputError: there are no samples.
    """

    def __init__(self, model: ir.Model, data: Sequence[Feeds], *, releases_weights: bool = False) -> None:
        if not data:
            raise InputError(
                "there is no calibration data", hint="give compile(..., calibration=) or --calibration"
            )
        self._model = model
        self._releases_weights = releases_weights
        self._data = data if isinstance(data, CalibrationData) else CalibrationData(data)
        self._kept: list[dict[str, Array]] = [{} for _ in self._data]
        self._done: set[ir.Node] = set()
        self._again = _prologue(model.graph)

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._data)

    def advance(self, values: Sequence[ir.Value | str]) -> Iterator[Tap]:
        """Run on up to ``values`` and give them, one sample after the other; iterate to the end.

        Raises:
            InputError: a value lies behind the position, is unknown, or onnxruntime fails on a sample.
        """
        names = [_name(value) for value in values]
        piece = _Piece(self._model, names, set(self._kept[0]), self._again, self._done)
        session = piece.session(self._kept[0]) if piece.nodes else None
        for index, feeds in enumerate(self._data):
            known = {**feeds, **self._kept[index]}
            if session is not None:
                known |= run_session(session, {name: known[name] for name in piece.inputs})
            self._kept[index] = {name: known[name] for name in piece.kept}
            yield Tap(feeds, {name: known[name] for name in names})
        self._done |= set(piece.nodes)
        self._release(piece.nodes)

    def _release(self, nodes: Sequence[ir.Node]) -> None:
        """Let go of the weights that were read, in memory or, if they are not needed any more, as a whole."""
        # What is computed again at every piece, a norm of the embeddings say, keeps its weights.
        finished = {node for node in self._done if node.outputs[0].name not in self._again}
        inputs = {value for node in nodes for value in node.inputs if value is not None}
        for value in (value for value in inputs if value.is_initializer()):
            release(value.const_value)
            if self._releases_weights and all(use.node in finished for use in value.uses()):
                value.const_value = None


class _Piece:
    """The nodes between what is known and some values, and what must be kept after them.

    Attributes:
        nodes: what is to be run, in the graph's order.
        inputs: what the nodes read that is known, by name.
        kept: what nodes that were not run read, by name; what is quick to compute again is left out.
    """

    def __init__(
        self, model: ir.Model, names: Sequence[str], known: set[str], again: set[str], done: set[ir.Node]
    ) -> None:
        self._model, self._names, self._again = model, names, again
        by_name = {str(value.name): value for node in model.graph for value in node.outputs}
        by_name |= {str(value.name): value for value in model.graph.inputs}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            raise InputError(f"calibration: the graph has no tensor {unknown[0]!r}")
        self.inputs: dict[str, ir.Value] = {}
        self.nodes = self._needed([by_name[name] for name in names], known, done)
        finished = done.union(self.nodes)
        made = {str(value.name) for node in self.nodes for value in node.outputs} - again
        self.kept = {
            name
            for name in known | made
            if name in by_name and any(use.node not in finished for use in by_name[name].uses())
        }
        self._outputs = [by_name[name] for name in sorted(made & (self.kept | set(names)))]
        self._outputs += [by_name[name] for name in sorted(again & set(names))]

    def _needed(self, values: Iterable[ir.Value], known: set[str], done: set[ir.Node]) -> list[ir.Node]:
        pending, needed = list(values), set()
        while pending:
            value = pending.pop()
            node = value.producer()
            if node is None or value.name in known:
                if value.const_value is None or value.is_graph_input():
                    self.inputs[str(value.name)] = value
                continue
            if node in done and value.name not in self._again:
                raise InputError(
                    f"calibration: {value.name!r} was passed and is no longer kept",
                    hint="ask for values in the order of the graph",
                )
            if node not in needed:
                needed.add(node)
                pending.extend(values_read(node))
        return [node for node in self._model.graph if node in needed]

    def session(self, known: Mapping[str, Array]) -> onnxruntime.InferenceSession:
        """A session over the nodes; products of quantised weights are exactly what their bodies say."""
        initializers = {
            value: None
            for node in self.nodes
            for value in values_read(node)
            if value.is_initializer() and str(value.name) not in self.inputs
        }
        view = ir.GraphView(
            list(self.inputs.values()),
            self._outputs,
            nodes=self.nodes,
            initializers=tuple(initializers),
            opset_imports=self._model.graph.opset_imports,
            name="piece",
        )
        graph = view.clone()
        for value in graph.inputs:
            array = known.get(str(value.name))
            if isinstance(array, list):  # a sequence
                value.type = ir.SequenceType(ir.TensorType(ir.DataType.from_numpy(array[0].dtype)))
            elif array is not None:
                value.dtype = ir.DataType.from_numpy(array.dtype)
                value.shape = ir.Shape(_fixed_sizes(value, array))
        functions = list(self._model.functions.values())
        piece = ir.Model(graph, ir_version=self._model.ir_version, functions=functions)
        return _open(piece)


def _fixed_sizes(value: ir.Value, array: Array) -> list[int | None]:
    """The sizes that all samples share. Where no float16 kernel is, onnxruntime needs heads and features."""
    declared = [None] * array.ndim if value.shape is None else list(value.shape)
    return [
        size if isinstance(dim, int) and dim == size else None
        for dim, size in zip(declared, array.shape, strict=True)
    ]


def _open(piece: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Buffers go back after each run, and workers sleep while the caller computes statistics.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in _DEQUANTIZE_ONCE.items():
        options.add_session_config_entry(key, value)
    # The second is what onnxruntime copies from while the session opens.
    serialized, _weights = serialize_sharing_weights(piece, options)
    return open_session(serialized, options)


def _prologue(graph: ir.Graph) -> set[str]:
    """Names of the values that no heavy op comes before: cheap to compute from the graph's inputs."""
    cheap: set[str] = set()
    expensive: set[ir.Value] = set()
    for node in graph:
        is_heavy = node.domain != "" or node.op_type in _HEAVY
        if is_heavy or any(value in expensive for value in values_read(node)):
            expensive.update(node.outputs)
        else:
            cheap.update(str(value.name) for value in node.outputs)
    return cheap


def _name(value: ir.Value | str) -> str:
    return value if isinstance(value, str) else str(value.name)
