"""One GPTQ run of one implementation in a process of its own: its weights and its seconds.

    python gptq_workers.py NAME FOLDER

FOLDER holds ``job.json`` (bits, group_size, symmetric), ``calibration.npy`` (token ids [windows, length]),
``model/`` (a transformers folder) and ``model.onnx`` (the same model as plain ONNX). What comes out, beside
them: ``weights.safetensors``, the linears' dequantised weights [out, in] float32 by the linear's name, and
``result.json``. ``gptq_peers.py`` writes the folder, starts this file with each implementation's interpreter,
and judges all results alike; so only what an implementation itself needs is imported here.

The peers' settings are alike where they have them: damping 0.01, no reordering of columns, no search for
clipping, blocks of 128, lm_head untouched. planish runs with its own defaults, which reorder columns, search
for clipping below 5 bits and refine the result. What else differs is said at each function.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = dict[str, Array]
"""Dequantised weights [out, in] float32 by the linear's name."""

_HEAD = "lm_head"
_DAMP, _BLOCK = 0.01, 128


@dataclass(frozen=True)
class Job:
    """What is to be done."""

    folder: Path
    bits: int
    group_size: int
    symmetric: bool

    @property
    def calibration(self) -> Array:
        """Token ids [windows, length] int64."""
        return np.asarray(np.load(self.folder / "calibration.npy"))

    def module(self) -> Any:
        """The model in transformers, float32."""
        import torch
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder / "model", dtype=torch.float32
        ).eval()

    def feeds(self) -> Iterator[dict[str, Array]]:
        """The graph's inputs for each window."""
        config = json.loads((self.folder / "model" / "config.json").read_text())
        empty = np.zeros((1, config["num_key_value_heads"], 0, config["head_dim"]), np.float32)
        for window in self.calibration:
            ids = window[None]
            feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            feeds["position_ids"] = np.arange(ids.shape[1], dtype=np.int64)[None]
            for layer in range(config["num_hidden_layers"]):
                feeds |= {f"past_key_values.{layer}.{part}": empty for part in ("key", "value")}
            yield feeds


class Stopwatch:
    """Seconds from loading done to weights quantised."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._start


def planish(job: Job, watch: Stopwatch, settings: str = "") -> Weights:
    """This package with its defaults, on the ONNX file: columns reordered, clipping searched, refined."""
    import planish as package
    from planish.ir import ops
    from planish.passes.infrastructure.pipeline import Pipeline

    scheme = f"W{job.bits}A16" + ("" if job.symmetric else "_ASYM")
    options = f"scheme={scheme},group_size={job.group_size},algorithm=gptq,embeddings=false{settings}"
    passes = Pipeline.of(f"canonicalize,quantize{{{options}}}")
    with watch:
        compiled = package.compile(
            job.folder / "model.onnx", passes, calibration=list(job.feeds()), target="portable", check="none"
        )
    return {
        re.sub(r"\.weight_quantized$", "", str(node.inputs[1].name)): _dequantized(node)
        for node in compiled.model.graph
        if node.op_type in ops.LINEAR_OPS
    }


def planish_as_published(job: Job, watch: Stopwatch) -> Weights:
    """This package with the published algorithm and nothing else: the peers' settings."""
    return planish(job, watch, ",act_order=false,clip=false,sweeps=0")


def _dequantized(node: Any) -> Array:
    """The weight of a planish linear, [N, K]."""
    from planish.ir import ops

    weight, scale = (ops.operand(node, name).const_value.numpy() for name in ("W", "scale"))
    zero = ops.operand(node, "zero_point")
    values = weight.astype(np.float32)
    blocks = np.atleast_2d(scale).shape[0]
    values = values.reshape(blocks, -1, values.shape[1])
    if zero is not None:
        values = values - np.atleast_2d(zero.const_value.numpy()).astype(np.float32)[:, None]
    return (values * np.atleast_2d(scale)[:, None]).reshape(weight.shape).T.astype(np.float32)


def onnxruntime(job: Job, watch: Stopwatch) -> Weights:
    """`onnxruntime.quantization`'s GPTQ. Covariances are those of the float model: nothing is sequential."""
    import onnx
    from onnxruntime.quantization.neural_compressor import gptq_quantize

    model = onnx.load(job.folder / "model.onnx")
    settings = {
        "bits": job.bits,
        "group_size": job.group_size,
        "scheme": "sym" if job.symmetric else "asym",
        "algorithm": "GPTQ",
    }
    weight_of = {node.name: node.input[1] for node in model.graph.node if node.op_type == "MatMul"}
    linears = {
        node: name.removesuffix(".weight") for node, name in weight_of.items() if "_proj.weight" in name
    }
    with watch:
        result = gptq_quantize(
            model,
            ((feeds, None) for feeds in job.feeds()),
            # For every layer: what is left out takes the settings of the layer before it.
            weight_config={node: settings if node in linears else "fp32" for node in weight_of},
            n_samples=-1,
            percdamp=_DAMP,
            blocksize=_BLOCK,
        )
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in result.model.graph.initializer}
    weights = {}
    for node in result.model.graph.node:
        if node.op_type == "MatMulNBits":
            weights[linears[node.name.removesuffix("_Q4")]] = _unpacked(node, constants)
        elif node.name in linears:
            weights[linears[node.name]] = np.ascontiguousarray(constants[node.input[1]].T)
    return weights


def _unpacked(node: Any, constants: dict[str, Array]) -> Array:
    """The weight of a 4-bit MatMulNBits node, [N, K]."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns, size = attributes["N"], attributes["K"], attributes["block_size"]
    packed = constants[node.input[1]].reshape(rows, -1, size // 2)
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1, size).astype(np.float32)
    zero: Any = 8.0
    if len(node.input) > 3:
        zeros = constants[node.input[3]].reshape(rows, -1)
        zero = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(rows, -1)[:, : values.shape[1], None]
    scales = constants[node.input[2]].reshape(rows, -1, 1)
    return np.asarray(((values - zero) * scales).reshape(rows, -1)[:, :columns], np.float32)


def llmcompressor(job: Job, watch: Stopwatch) -> Weights:
    """vLLM's llm-compressor, its sequential pipeline."""
    import datasets
    import torch
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    module = job.module()
    ids = job.calibration.tolist()
    data = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    loader = torch.utils.data.DataLoader(data.with_format("torch"), batch_size=1)
    weights = QuantizationArgs(
        num_bits=job.bits,
        symmetric=job.symmetric,
        strategy="channel" if job.group_size < 0 else "group",
        group_size=None if job.group_size < 0 else job.group_size,
    )
    recipe = GPTQModifier(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=[_HEAD],
        dampening_frac=_DAMP,
        block_size=_BLOCK,
        actorder=None,
    )
    with watch:
        oneshot(
            model=module,
            tokenizer=transformers.AutoTokenizer.from_pretrained(job.folder / "model"),
            dataset=loader,
            recipe=recipe,
            pipeline="sequential",
            num_calibration_samples=len(ids),
        )
    return _linear_weights(module)


def _linear_weights(module: Any) -> Weights:
    """The weights of a torch model whose linears hold dequantised values."""
    import torch

    return {
        name: linear.weight.detach().float().numpy()
        for name, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear) and name != _HEAD
    }


def neural_compressor(job: Job, watch: Stopwatch) -> Weights:
    """Intel Neural Compressor for torch, true-sequential."""
    import torch
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    module = job.module()
    settings = GPTQConfig(
        bits=job.bits,
        use_sym=job.symmetric,
        group_size=job.group_size,
        percdamp=_DAMP,
        block_size=_BLOCK,
        act_order=False,
        true_sequential=True,
    )
    with watch:
        prepared = prepare(module, settings)
        for window in job.calibration:
            prepared(torch.from_numpy(window[None]))
        converted = convert(prepared)
    return {
        name: linear.recover().detach().float().numpy()
        for name, linear in converted.named_modules()
        if hasattr(linear, "recover")
    }


def gptqmodel(job: Job, watch: Stopwatch) -> Weights:
    """ModelCloud's GPTQModel, its defaults for everything but the scheme and the order of columns."""
    # Its model loader wants two threads, and it gives the CPU half of the cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FORMAT

    settings = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        desc_act=False,
        act_group_aware=False,
        damp_percent=_DAMP,
        # Zero points as they are (version 1 stores them less one); layers in memory, to be read here.
        format=FORMAT.GPTQ_V2,
        offload_to_disk=False,
        device="cpu",
    )
    model = GPTQModel.load(str(job.folder / "model"), settings, dtype=torch.float32)
    calibration = [
        {
            "input_ids": torch.from_numpy(row)[None],
            "attention_mask": torch.ones(1, len(row), dtype=torch.int64),
        }
        for row in job.calibration
    ]
    with watch:
        model.quantize(calibration, batch_size=1)
    return {
        name: linear.dequantize_weight().T.detach().float().numpy()
        for name, linear in model.model.named_modules()
        if hasattr(linear, "dequantize_weight")
    }


def nncf(job: Job, watch: Stopwatch) -> Weights:
    """NNCF on OpenVINO. It damps by 0.1 and has 4 bits only; scales are float16."""
    import nncf as package
    import openvino

    if job.bits != 4:
        raise SystemExit("nncf: integer weights of 4 bits only")
    model = openvino.Core().read_model(job.folder / "model.onnx")
    _transpose_weights(model)
    mode = package.CompressWeightsMode
    with watch:
        compressed = package.compress_weights(
            model,
            mode=mode.INT4_SYM if job.symmetric else mode.INT4_ASYM,
            group_size=job.group_size,
            ratio=1.0,
            gptq=True,
            dataset=package.Dataset(list(job.feeds())),
            subset_size=len(job.calibration),
            backup_mode=package.BackupMode.NONE,
            advanced_parameters=package.AdvancedCompressionParameters(
                gptq_params=package.AdvancedGPTQParameters(subset_size=len(job.calibration))
            ),
        )
    return _openvino_weights(compressed)


def _transpose_weights(model: Any) -> None:
    """W [K, N] → Wᵀ [N, K] with the transposition in the MatMul: the only layout that NNCF's GPTQ takes."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        weight = node.input_value(1).get_node()
        if weight.get_type_name() != "Constant":
            continue
        constant = opset13.constant(np.ascontiguousarray(weight.data.T), name=weight.get_friendly_name())
        product = opset13.matmul(node.input_value(0), constant, False, True, name=node.get_friendly_name())
        node.output(0).replace(product.output(0))


def _openvino_weights(model: Any) -> Weights:
    """What the compressed constants of an OpenVINO model dequantise to, by the linear's name."""
    import openvino

    weights = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        source = node.input_value(1)
        names = [str(op.get_friendly_name()) for op in _constants_of(source.get_node())]
        name = next((m.group(1) for text in names if (m := re.match(r"(.*_proj)\.weight", text))), None)
        if name is None:
            continue
        alone = openvino.compile_model(openvino.Model([source], [], "weight"), "CPU")
        value = np.asarray(alone([])[0], np.float32)
        weights[name] = value if node.get_attributes()["transpose_b"] else np.ascontiguousarray(value.T)
    return weights


def _constants_of(node: Any) -> Iterator[Any]:
    if node.get_type_name() == "Constant":
        yield node
    for value in node.input_values():
        yield from _constants_of(value.get_node())


WORKERS: dict[str, Callable[[Job, Stopwatch], Weights]] = {
    "planish": planish,
    "planish-as-published": planish_as_published,
    "onnxruntime": onnxruntime,
    "nncf": nncf,
    "gptqmodel": gptqmodel,
    "llmcompressor": llmcompressor,
    "neural-compressor": neural_compressor,
}
_PACKAGES = {"planish-as-published": "planish", "neural-compressor": "neural-compressor-pt"}


def main() -> None:
    """Run one implementation."""
    from safetensors.numpy import save_file

    name, folder = sys.argv[1], Path(sys.argv[2])
    job = Job(folder, **json.loads((folder / "job.json").read_text()))
    watch = Stopwatch()
    weights = WORKERS[name](job, watch)
    save_file(
        {key: np.ascontiguousarray(array) for key, array in weights.items()}, folder / "weights.safetensors"
    )
    result = {
        "seconds": watch.seconds,
        "version": importlib.metadata.version(_PACKAGES.get(name, name)),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
