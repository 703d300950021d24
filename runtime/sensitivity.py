"""How much the outputs of a model change when some of its weights are replaced by others.

One session serves all replacements: in a copy of the graph, the weights in question are inputs. What measures
can be sent to another process, which opens a session of its own. For logits
the change is KL(softmax(dense) ‖ softmax(changed)), the mean over tokens in nats; for other outputs it is
‖changed − dense‖² / ‖dense‖². Padding tokens do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import torch

from ..ir import clone
from ..ir.errors import InputError
from .calibration.data import Feeds, has_batch_axis, token_mask
from .session import open_session, run_session, serialize_sharing_weights

Array = npt.NDArray[Any]

LOGITS = "logits"
_CACHE_PREFIXES = ("present", "past")
_MOST_REFERENCE_ELEMENTS = 1 << 25
"""Of the dense outputs that are kept, 256 MiB in all: beyond, tokens at equal distances stand for all."""
_DEQUANTIZE_ONCE = {"session.disable_quant_qdq": "1"}


class WeightSensitivity:
    """The dense outputs of a model on some samples, and how far changed weights move them.

    Args:
        model: not changed; its tensors are shared.
        weights: names of the initializers that will be replaced. Where the value's shape says less than its
            constant's, arrays of other sizes may take its place.
        samples: complete feeds, one small batch each.
        threads: of the session; one per core if absent. With one, threads may measure side by side.

    Raises:
        InputError: there are no samples, no float outputs, or the dense outputs are not finite.
        TargetError: onnxruntime rejects the graph.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Sequence[str],
        samples: Sequence[Feeds],
        *,
        threads: int | None = None,
    ) -> None:
        if not samples:
            raise InputError("sensitivities are measured on inputs, and there are none")
        self._samples = samples
        self._outputs = _measured_outputs(model)
        self._dense = {name: np.asarray(_constant(model, name).numpy(), order="C") for name in weights}
        self._session = _FreeWeights(model, weights, self._outputs, threads)
        self._reference = [
            {name: self._measure(name, _kept_rows(array, feeds, len(samples))) for name, array in outputs}
            for feeds, outputs in ((feeds, self._run(feeds, {}).items()) for feeds in samples)
        ]

    def _measure(self, name: str, dense: Array) -> _Divergence | _SquaredError:
        if not np.isfinite(dense).all():
            raise self._not_finite()
        return _Divergence(dense) if name == LOGITS else _SquaredError(dense)

    def _not_finite(self) -> InputError:
        broken = [name for name, array in self._dense.items() if not np.isfinite(array).all()]
        if broken:
            return InputError(f"weight {broken[0]!r} holds NaN or infinity", hint="export the model again")
        return InputError("the model's outputs on the calibration data are not finite")

    def loss(self, changed: Mapping[str, Array], samples: Sequence[Feeds] | None = None) -> float:
        """The change of the outputs when ``changed`` weights replace their own; infinite if not finite.

        Args:
            changed: new weights by name.
            samples: the same samples for the changed model, where it needs other feeds, such as caches of
                fewer heads.
        """
        return self.change(self._run(feeds, changed) for feeds in samples or self._samples)

    def change(self, outputs: Iterable[Mapping[str, Array]]) -> float:
        """How far these outputs on the samples, by name, are from the dense ones; infinite if not finite."""
        total: dict[str, list[tuple[float, float]]] = {name: [] for name in self._outputs}
        for feeds, reference, found in zip(self._samples, self._reference, outputs, strict=True):
            for name in self._outputs:
                total[name].append(reference[name].of(_kept_rows(found[name], feeds, len(self._samples))))
        ratios = [_ratio(pairs) for pairs in total.values()]
        mean = float(np.mean(ratios))
        return max(mean, 0.0) if np.isfinite(mean) else float("inf")

    def _run(self, feeds: Feeds, changed: Mapping[str, Array]) -> dict[str, Array]:
        weights = {
            name: np.asarray(changed[name], dense.dtype, order="C") if name in changed else dense
            for name, dense in self._dense.items()
        }
        return self._session.run({**feeds, **weights})

    def dense(self, weight: str) -> Array:
        """A weight as the model has it; not to be written."""
        return self._dense[weight]


def first_samples(data: Sequence[Feeds], count: int, model: ir.Model) -> list[Feeds]:
    """The first ``count`` samples of batches: whole batches, and the part of the last one that is needed.

    Where ``model`` has a fixed number of samples, or no batch axis, the last one is whole, too.
    """
    splits = has_batch_axis(model)
    found: list[Feeds] = []
    for feeds in data:
        if count <= 0:
            break
        sizes = {array.shape[0] if array.ndim else None for array in feeds.values()}
        size = sizes.pop() if len(sizes) == 1 else None
        whole = size is None or size <= count or not splits
        found.append(feeds if whole else {name: array[:count] for name, array in feeds.items()})
        count -= size or 1
    return found


def _measured_outputs(model: ir.Model) -> list[str]:
    """The logits if there are any; else every float output that is no cache."""
    names = [str(value.name) for value in model.graph.outputs]
    if LOGITS in names:
        return [LOGITS]
    found = [
        str(value.name)
        for value in model.graph.outputs
        if value.dtype is not None
        and value.dtype.is_floating_point()
        and not str(value.name).startswith(_CACHE_PREFIXES)
    ]
    if not found:
        raise InputError(f"sensitivities are measured on float outputs, the model has {names}")
    return found


def _constant(model: ir.Model, name: str) -> ir.TensorProtocol:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise InputError(f"the model has no constant weight {name!r}")
    return value.const_value


class _FreeWeights:
    """A graph whose inputs are the model's and some weights, in a session; each process opens its own."""

    def __init__(
        self, model: ir.Model, weights: Sequence[str], outputs: Sequence[str], threads: int | None
    ) -> None:
        copy = clone(model)
        graph = copy.graph
        for name in weights:
            value = graph.initializers.pop(name)
            value.const_value = None
            if value not in graph.inputs:
                graph.inputs.append(value)
        kept = [value for value in graph.outputs if value.name in outputs]
        graph.outputs[:] = kept
        self._threads = threads
        options = self._options()
        self._serialized, self._shared = serialize_sharing_weights(copy, options)
        self._beside: Mapping[str, ir.TensorProtocol | Array] = {
            name: _constant(copy, name) for name in self._shared
        }
        self._session: onnxruntime.InferenceSession | None = open_session(self._serialized, options)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """The outputs for these inputs and weights."""
        if self._session is None:
            options = self._options()
            self._shared = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array))
                for name, array in self._beside.items()
            }
            if self._shared:
                options.add_external_initializers(list(self._shared), list(self._shared.values()))
            self._session = open_session(self._serialized, options)
        return run_session(self._session, feeds)

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        for key, entry in _DEQUANTIZE_ONCE.items():
            options.add_session_config_entry(key, entry)
        return options

    def __getstate__(self) -> dict[str, Any]:
        arrays = {
            name: array if isinstance(array, np.ndarray) else np.asarray(array.numpy(), order="C")
            for name, array in self._beside.items()
        }
        return self.__dict__ | {"_session": None, "_shared": {}, "_beside": arrays}


def _kept_rows(array: Array, feeds: Feeds, batches: int) -> Array:
    """[tokens, features] without padding; at most as many tokens as there is room for."""
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    mask = token_mask(feeds)
    if mask is not None and mask.size == len(rows):
        rows = rows[mask.reshape(-1)]
    room = max(1, _MOST_REFERENCE_ELEMENTS // batches // rows.shape[-1])
    if len(rows) <= room:
        return rows
    return rows[np.linspace(0, len(rows) - 1, room).round().astype(np.int64)]


class _Divergence:
    """Σ KL(softmax(dense) ‖ softmax(changed)) over tokens; what depends on the dense rows is computed once.

    KL = Σ_v p_v log p_v − (Σ_v p_v q_v − log Σ_v exp q_v)        p = softmax(dense), q = changed
    """

    def __init__(self, dense: Array) -> None:
        logarithms = torch.log_softmax(torch.from_numpy(np.asarray(dense, np.float64)), dim=-1)
        self._probabilities = logarithms.exp()
        self._negative_entropy = float((self._probabilities * logarithms).sum())

    def of(self, changed: Array) -> tuple[float, float]:
        """The sum over the rows [tokens, vocabulary] in nats, in float64, and the number of rows."""
        logits = torch.from_numpy(np.asarray(changed, np.float64))
        expected = torch.dot(self._probabilities.flatten(), logits.flatten())
        normalizers = torch.logsumexp(logits, dim=-1).sum()
        return self._negative_entropy - float(expected - normalizers), float(len(logits))


class _SquaredError:
    """‖changed − dense‖² and ‖dense‖²."""

    def __init__(self, dense: Array) -> None:
        self._dense = np.asarray(dense, np.float64)
        self._size = float(np.square(self._dense).sum())

    def of(self, changed: Array) -> tuple[float, float]:
        """Of rows [tokens, features], in float64."""
        return float(np.square(changed - self._dense).sum()), self._size


def _ratio(pairs: Sequence[tuple[float, float]]) -> float:
    error = sum(pair[0] for pair in pairs)
    size = sum(pair[1] for pair in pairs)
    return error / size if size else error
