"""The recipes that people use today for the same job, for a comparison in the same run."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from sentence_model import SentenceEmbedder, example, load_module, sentence_feeds

Array = np.ndarray[Any, Any]
_NAMES = ("input_ids", "attention_mask")
# onnxruntime's optimizer wants the hidden size and heads of the model.
_HEADS, _HIDDEN = 12, 384


def dynamo_export(module: SentenceEmbedder, path: Path) -> Path:
    """torch's own export with its default options: the file a user has who does nothing else."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {name: {0: dynamic, 1: dynamic} for name in _NAMES}
    with _quiet():
        program = torch.onnx.export(
            module, (), kwargs=example(), dynamic_shapes=shapes, dynamo=True, verbose=False
        )
    program.save(str(path))
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on torchvision and on their own future."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def torchscript_export(path: Path) -> Path:
    """The older exporter on spelled-out attention, which onnxruntime's optimizer recognises."""
    axes = {name: {0: "batch", 1: "sequence"} for name in _NAMES}
    with _quiet():
        torch.onnx.export(
            load_module(attention="eager"),
            tuple(example().values()),
            str(path),
            input_names=list(_NAMES),
            output_names=["embedding"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return path


def transformers_optimizer(source: Path, path: Path) -> Path:
    """onnxruntime's transformers optimizer, float."""
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(source), model_type="bert", num_heads=_HEADS, hidden_size=_HIDDEN)
    model.save_model_to_file(str(path))
    return path


def dynamic_int8(source: Path, path: Path) -> Path:
    """onnxruntime's quantize_dynamic, signed weights per channel."""
    quantize_dynamic(
        source,
        path,
        per_channel=True,
        weight_type=QuantType.QInt8,
        # onnx's shape inference stops at the optimizer's contrib ops; all activations here are float.
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )
    return path


class OnnxruntimePeer:
    """Plain onnxruntime with default options."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.path = path

    def __call__(self, feeds: Mapping[str, Array]) -> Array:
        """Embed."""
        return np.asarray(self.session.run(None, dict(feeds))[0])


class OpenVinoPeer:
    """OpenVINO's CPU plug-in with a latency hint; ``precision`` is its inference precision hint."""

    def __init__(self, source: Path, path: Path, *, precision: str, int8: bool = False) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(source))
        if int8:
            import nncf

            model = nncf.quantize(
                model,
                nncf.Dataset(sentence_feeds()),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(sentence_feeds()),
            )
        openvino.save_model(model, str(path), compress_to_fp16=False)
        self.path = path.with_suffix(".bin")
        self.compiled = core.compile_model(
            model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
        )
        self.request = self.compiled.create_infer_request()

    def __call__(self, feeds: Mapping[str, Array]) -> Array:
        """Embed."""
        return np.array(self.request.infer(dict(feeds))[0])


def openvino_runs_bfloat16() -> bool:
    """Whether this processor has bfloat16 in OpenVINO's eyes."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
