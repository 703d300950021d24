"""Portable files in other runtimes: onnxruntime, OpenVINO, and onnxruntime-web's WebAssembly and WebGPU.

Small random models are compiled to the target ``portable`` by many schemes, and small checkpoints of GPTQ,
AWQ and compressed-tensors are read and compiled to it. What each runtime gives is compared with the same
graph as onnxruntime runs it node by node, without optimising it. WebGPU is not run: how many nodes it has
kernels for comes from its documented operators.

Decoders saved in the hub's layout are also loaded by transformers.js, which must generate the same tokens.

    npm install --prefix FOLDER onnxruntime-web @huggingface/transformers
    python benchmarks/compatibility.py --npm FOLDER      # writes results/compatibility.md
    python benchmarks/compatibility.py --only gptq       # prints; without --npm, nothing is run in node
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import openvino
import planish
import torch
import transformers
from planish.ir import clone
from planish.runtime.calibration.data import completed
from planish.runtime.model_file import ModelFile
from planish.runtime.reference import run_model
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import checkpoints

_RESULTS = Path(__file__).parent / "results" / "compatibility.md"
_WEB_WORKER = Path(__file__).parent / "web_worker.mjs"
_HUB_WORKER = Path(__file__).parent / "hub_worker.mjs"
_VOCABULARY = 128
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_RNG = np.random.default_rng(0)
_IDS = _RNG.integers(1, _VOCABULARY, (2, 24))
_PROMPT, _NEW = [[1, 5, 9, 20, 33, 7]], 24
_IMAGES = _RNG.standard_normal((2, 3, 32, 32)).astype(np.float32)

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a traced graph, passes, and the output that is compared."""

    name: str
    graph: Callable[[], ir.Model]
    passes: str
    output: str = "logits"

    def compiled(self) -> planish.CompiledModel:
        """The model in standard ops."""
        graph = clone(self.graph())
        return planish.compile(graph, self.passes, target="portable", calibration=[_inputs(graph)])


def _inputs(graph: ir.Model) -> Feeds:
    names = {value.name for value in graph.graph.inputs}
    return {"pixel_values": _IMAGES} if "pixel_values" in names else {"input_ids": _IDS}


def _llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, max_position_embeddings=128)
    return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def llama() -> ir.Model:
    """A decoder with its cache: hidden size 128, 2 layers, 4 heads that share 2 of keys and values."""
    return planish.trace_causal_lm(_llama())


@functools.cache
def bert() -> ir.Model:
    """An encoder: hidden size 128, 2 layers."""
    torch.manual_seed(0)
    module = transformers.BertForSequenceClassification(transformers.BertConfig(**_SIZES)).eval()
    return planish.trace(module, {"input_ids": torch.from_numpy(_IDS)})


@functools.cache
def resnet() -> ir.Model:
    """A convolutional network of two stages."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_labels=16, layer_type="basic"
    )
    module = transformers.ResNetForImageClassification(config).eval()
    return planish.trace(module, {"pixel_values": torch.from_numpy(_IMAGES)})


def _compressed(bits: int, format_: str, activations: Mapping[str, Any] | None = None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "channel"}
    weights |= {"strategy": "group", "group_size": 32} if bits < 8 else {}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
_GPTQ = {"quant_method": "gptq", "group_size": 32, "checkpoint_format": "gptq"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
CHECKPOINTS: Mapping[str, tuple[dict[str, Any], Callable[[Any], Any], dict[str, Any]]] = {
    "GPTQ 4 bits, act order": (
        _GPTQ,
        lambda layer: checkpoints.gptq(layer, 4),
        {"bits": 4, "group_size": 32, "act_order": True},
    ),
    "GPTQ 3 bits, symmetric": (
        _GPTQ,
        lambda layer: checkpoints.gptq(_unsigned(layer, 3), 3),
        {"bits": 3, "group_size": 32, "symmetric": True},
    ),
    "AWQ 4 bits": (_AWQ, checkpoints.awq, {"bits": 4, "group_size": 32}),
    "compressed-tensors W4A16": (
        _compressed(4, "pack-quantized"),
        lambda layer: checkpoints.pack_quantized(layer, 4, symmetric=True),
        {"bits": 4, "group_size": 32, "symmetric": True},
    ),
    "compressed-tensors W8A8": (
        _compressed(8, "int-quantized", _TOKEN),
        checkpoints.int_quantized,
        {"bits": 8, "symmetric": True},
    ),
}


def _rounded(
    weight: Array, *, bits: int, group_size: int = 0, symmetric: bool = False, act_order: bool = False
) -> checkpoints.Layer:
    """A weight [N, K] rounded to nearest; symmetric ones signed, others not."""
    groups = np.arange(weight.shape[1]) // (group_size or weight.shape[1])
    if act_order:
        _RNG.shuffle(groups)
    columns = [weight[:, groups == group] for group in range(groups.max() + 1)]
    highest = np.stack([part.max(1).clip(0) for part in columns], axis=1)
    lowest = np.stack([part.min(1).clip(None, 0) for part in columns], axis=1)
    levels = (1 << bits) - 1
    if symmetric:
        scales = np.maximum(highest, -lowest) / (levels // 2)
        zero_points, start = np.zeros(scales.shape, int), -(levels // 2) - 1
    else:
        scales, start = (highest - lowest) / levels, 0
        zero_points = np.clip(np.round(-lowest / scales), 1, levels).astype(int)
    scales = scales.astype(np.float16)
    integers = np.round(weight / scales.astype(np.float32)[:, groups]) + zero_points[:, groups]
    return checkpoints.Layer(
        np.clip(integers, start, start + levels).astype(int), scales, zero_points, groups
    )


def _unsigned(layer: checkpoints.Layer, bits: int) -> checkpoints.Layer:
    middle = 1 << (bits - 1)
    return dataclasses.replace(
        layer, integers=layer.integers + middle, zero_points=layer.zero_points + middle
    )


@functools.cache
def checkpoint(name: str) -> ir.Model:
    """The Llama, read from a checkpoint in one of the formats."""
    config, pack, options = CHECKPOINTS[name]
    module = _llama()
    layers = {}
    for layer in checkpoints.quantised_layers(module):
        weight = _rounded(module.get_parameter(f"{layer}.weight").detach().numpy(), **options)
        layers[layer] = (weight, pack(weight))
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write(Path(folder) / "llama", module, layers, config)
        return planish.load_checkpoint(Path(folder) / "llama")


_DECODER_SCHEMES = (
    "float",
    "W8A16",
    "W4A16,group_size=32",
    "W4A16_ASYM,group_size=32",
    "W3A16,group_size=32",
    "W2A16,group_size=16",
    "W4A16,group_size=16,algorithm=spqr",
    "W8A8",
    "W8A8,activations=token",
    "W8A8,activations=static",
    "W4A8,group_size=32",
    "W4A4,group_size=-1",
    "NF4",
    "MXFP4A16",
    "NVFP4A16",
    "FP8A16",
)


def _quantised(scheme: str) -> str:
    if scheme == "float":
        return "canonicalize,fuse"
    name, _, options = scheme.partition(",")
    return f"canonicalize,fuse,quantize{{scheme={name}{',' if options else ''}{options}}}"


def cases() -> Iterator[Case]:
    """All rows."""
    for scheme in _DECODER_SCHEMES:
        yield Case(f"Llama, {scheme}", llama, _quantised(scheme))
    yield Case("Llama, W4A8 rotated", llama, "canonicalize,fold-norms,rotate,quantize{scheme=W4A8}")
    yield Case("Llama, W8A16, cache of 8 bits", llama, _quantised("W8A16") + ",kv-cache{bits=8}")
    yield Case("Llama, W8A16, cache of 4 bits", llama, _quantised("W8A16") + ",kv-cache{bits=4}")
    for name in CHECKPOINTS:
        yield Case(f"Llama from {name}", functools.partial(checkpoint, name), "canonicalize,fuse")
    for scheme in ("float", "W8A16", "W4A16,group_size=32", "W8A8"):
        yield Case(f"BERT, {scheme}", bert, _quantised(scheme))
    for scheme in ("float", "W8A16", "W4A16,group_size=-1"):
        yield Case(f"ResNet, {scheme}", resnet, _quantised(scheme))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A case as a file, its inputs, and what is expected."""

    case: Case
    file: Path
    feeds: Feeds
    expected: Array
    webgpu: str

    def difference(self, found: Array | str) -> str:
        """Relative to the largest expected number, or why there is none."""
        if isinstance(found, str):
            return found
        difference = np.abs(found - self.expected).max() / np.abs(self.expected).max()
        return f"{difference:.0e}" if difference else "0"


def prepare(case: Case, folder: Path) -> Prepared:
    """Compile, save, and run node by node."""
    model = case.compiled()
    file = model.save(folder / f"{len(list(folder.glob('*.onnx')))}.onnx")
    feeds = completed(_inputs(case.graph()), model.bound.model)
    expected = run_model(model.bound.model, feeds)[case.output]
    support = model.web_support("webgpu")
    missing = sum(support.unsupported.values())
    return Prepared(case, file, feeds, expected, f"{support.nodes - missing} of {support.nodes}")


def run_onnxruntime(prepared: Prepared) -> Array | str:
    """By its defaults."""
    result: Array = ModelFile(prepared.file).run(prepared.feeds)[prepared.case.output]
    return result


def run_openvino(prepared: Prepared) -> Array | str:
    """On the CPU, without the liberties that it takes with precision by default."""
    core = openvino.Core()
    try:
        hints = {"EXECUTION_MODE_HINT": "ACCURACY"}
        compiled = core.compile_model(core.read_model(prepared.file), "CPU", hints)
        result: Array = compiled(dict(prepared.feeds))[prepared.case.output]
    except RuntimeError as error:
        return f"no: {_reason(str(error))}"
    return result


def _reason(text: str) -> str:
    """The line of OpenVINO's error that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check ", "FrontEnd API"))]
    return (telling or lines)[-1].replace("|", "/")[:90]


def run_web(prepared: Sequence[Prepared], folder: Path | None) -> tuple[str, list[Array | str]]:
    """All files in one process of node; its version, and the outputs."""
    if folder is None:
        return "", [""] * len(prepared)
    found = _in_node(_WEB_WORKER, folder, [_job(one) for one in prepared])
    return found["version"], [
        _decoded(result, one.expected) for result, one in zip(found["results"], prepared, strict=True)
    ]


def _job(prepared: Prepared) -> dict[str, Any]:
    feeds = {
        name: {
            "type": str(array.dtype),
            "dims": list(array.shape),
            "data": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
        }
        for name, array in prepared.feeds.items()
    }
    return {"model": str(prepared.file), "output": prepared.case.output, "feeds": feeds}


def _decoded(result: Mapping[str, str], like: Array) -> Array | str:
    if "error" in result:
        return f"no: {result['error'].splitlines()[0][:90]}"
    return np.frombuffer(base64.b64decode(result["data"]), np.float32).reshape(like.shape)


def _in_node(worker: Path, packages: Path, job: Any) -> Any:
    """Give a worker its job, and read its result."""
    with tempfile.TemporaryDirectory() as place:
        given, found = Path(place) / "job.json", Path(place) / "result.json"
        given.write_text(json.dumps(job))
        subprocess.run(["node", str(worker), str(packages), str(given), str(found)], check=True)
        return json.loads(found.read_text())


HUB = {"fp32": "float", "q8": "W8A8", "q4": "W4A16,group_size=32", "bnb4": "NF4", "q2": "W2A16,group_size=16"}
"""Schemes by what transformers.js calls them."""


def hub_lines(packages: Path) -> list[str]:
    """Save the Llama in all schemes into one folder, and let transformers.js generate from it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "llama"
        files, expected = [], []
        for dtype, scheme in HUB.items():
            model = Case(scheme, llama, _quantised(scheme)).compiled()
            files.append(model.save_hub(folder, external_data=dtype == "fp32").name)
            expected.append(model.generate(_PROMPT, _NEW)[0].tolist())
        job = {"folder": str(folder), "dtypes": list(HUB), "ids": _PROMPT[0], "tokens": _NEW}
        found = _in_node(_HUB_WORKER, packages, job)
    lines = [
        "",
        "## Folders in the hub's layout",
        "",
        f"transformers.js {found['version']} in node, from one folder that `save_hub` wrote: {_NEW} tokens "
        f"after {len(_PROMPT[0])}, greedy, beside planish's.",
        "",
        "| dtype | scheme | file | same tokens |",
        "|---|---|---|---|",
    ]
    for dtype, file, ours, theirs in zip(HUB, files, expected, found["tokens"], strict=True):
        same = "yes" if ours == theirs else theirs if isinstance(theirs, str) else "no"
        lines.append(f"| {dtype} | {HUB[dtype]} | `onnx/{file}` | {same} |")
    return lines


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--npm", type=Path, help="where npm installed the packages")
    parser.add_argument("--only", help="rows that have this in their name, in small letters; prints")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if (arguments.only or "") in case.name.lower()]
    with tempfile.TemporaryDirectory() as name:
        prepared = [prepare(case, Path(name)) for case in chosen]
        version, web = run_web(prepared, arguments.npm)
        rows = [
            [
                one.case.name,
                one.difference(run_onnxruntime(one)),
                one.difference(run_openvino(one)),
                one.difference(found),
                one.webgpu,
            ]
            for one, found in zip(prepared, web, strict=True)
        ]
    lines = _table(rows, version)
    if arguments.npm is not None and arguments.only is None:
        lines += hub_lines(arguments.npm)
    if arguments.only is None:
        _RESULTS.write_text("\n".join([*lines, ""]))
    Console(soft_wrap=True, markup=False).print("\n".join(lines))


def _table(rows: Sequence[Sequence[str]], version: str) -> list[str]:
    openvino_version = openvino.__version__.split("-")[0]
    return [
        "# Portable files in other runtimes",
        "",
        f"onnxruntime {onnxruntime.__version__}, OpenVINO {openvino_version} (CPU, mode ACCURACY), "
        f"onnxruntime-web {version or '(not run)'} in node; float32. Numbers are the largest difference of "
        "the logits from the same graph in onnxruntime without optimisation, relative to the largest logit. "
        "onnxruntime's 1e-2 where weights alone are quantised is its own choice: it fuses such weights to a "
        "product that rounds activations to 8 bits (`session.qdq_matmulnbits_accuracy_level`; the target "
        "`onnxruntime-cpu` measures what it costs). Where activations are quantised, sums in another order "
        "move some of them to the next integer. WebGPU is not run: the column is the nodes that its "
        "documented operators have kernels for, the others run in WebAssembly. Written by "
        "`benchmarks/compatibility.py`.",
        "",
        "| model and scheme | onnxruntime | OpenVINO | web, WebAssembly | web, kernels of WebGPU |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


if __name__ == "__main__":
    main()
