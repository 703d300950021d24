"""Trace, canonicalise, fuse, save and reload well-known architectures, and compare them with torch.

For each architecture: trace a small random model with dynamic shapes, run the passes, save it, load it again,
run it in onnxruntime at sizes other than the traced ones, and compare every output with torch:
max |a − b| / max |b| must stay below 1e-4. Causal language models run with and without a past and with left
padding; what a model computes at padded positions has no meaning and is left out.

    python benchmarks/tracing.py
    python benchmarks/tracing.py --only Llama --only BERT
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import planish.ir
import torch
from architectures import ARCHITECTURES, Architecture, by_name
from planish.codegen import get_target
from planish.ir.signature import META_KEY, flatten_inputs, flatten_with_paths, path_name, unflatten_outputs
from planish.ir.trace import trace
from planish.passes.canonicalize import Canonicalize
from planish.passes.fuse import Fuse
from planish.passes.infrastructure.base import PassContext
from rich.console import Console
from rich.table import Table

TOLERANCE = 1e-4
RESULTS = Path(__file__).parent / "results" / "tracing.md"
STAGES = ("trace", "canonicalize", "fuse")
"""What the model goes through; after the last one it is saved, reloaded and compared."""
SINGLE_NODES = (
    *("Attention", "RMSNormalization", "LayerNormalization", "RotaryEmbedding", "Gelu", "Swish", "Expand"),
    *("Transpose", "Reshape", "Softmax"),
)
COLUMNS = (
    *("Architecture", "nodes traced", "canonical", "fused", "seconds", "relative error of each call"),
    *("parameter names kept", "nodes of interest", "dynamic dimensions"),
)

Array = np.ndarray[Any, Any]
Outputs = Mapping[str, Array]


@dataclasses.dataclass
class Row:
    """What was found about one architecture."""

    name: str
    nodes: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    names_kept: str = ""
    dims: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether every stage ran and agrees with torch."""
        return not self.failure and all(max(errors) <= TOLERANCE for errors in self.errors.values())


def measure(architecture: Architecture, *, every_stage: bool = False) -> Row:
    """Run one architecture through all stages; what fails is noted in the row."""
    row = Row(architecture.name)
    module = architecture.module()
    with torch.no_grad():
        expected = outputs_of(module, architecture)
    model: ir.Model | None = None
    for stage in STAGES:
        start = time.perf_counter()
        try:
            model = _advance(model, stage, architecture, module)
            row.seconds[stage] = time.perf_counter() - start
            planish.ir.verify(model)
            row.nodes[stage] = sum(1 for _ in model.graph.all_nodes())
            if stage == "trace":
                row.names_kept, row.dims = names_kept(module, model), dynamic_dims(model)
            if every_stage or stage == STAGES[-1]:
                with tempfile.TemporaryDirectory() as folder:
                    found = outputs_of(compiled(model, Path(folder)), architecture)
                row.errors[stage] = relative_errors(found, expected)
        except Exception as error:  # noqa: BLE001 - the other architectures are measured all the same
            row.failure = f"{stage}: {type(error).__name__}: {error}".splitlines()[0][:300]
            break
    if model is not None:
        row.operations = collections.Counter(node.op_type for node in model.graph.all_nodes())
    return row


def _advance(
    model: ir.Model | None, stage: str, architecture: Architecture, module: torch.nn.Module
) -> ir.Model:
    if model is None:
        return trace(module, architecture.example, dynamic_shapes=architecture.dynamic_shapes)
    step = Canonicalize() if stage == "canonicalize" else Fuse()
    step.run(model, PassContext(target=get_target("portable")))
    return model


def outputs_of(model: Callable[..., Any], architecture: Architecture) -> list[Outputs]:
    """Run all calls of an architecture: named outputs, one mapping per call."""
    if architecture.example is not None:
        return [_named(model(**call)) for call in architecture.calls]
    outputs = []
    mask, cache = torch.zeros(0, 0, dtype=torch.int64), None
    for call in architecture.calls:
        batch, length = call["input_ids"].shape
        if mask.shape[0] != batch:
            mask, cache = torch.zeros(batch, 0, dtype=torch.int64), None
        mask = torch.cat([mask, call["attention_mask"]], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        result = model(
            input_ids=call["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = result.past_key_values
        outputs.append(_attended(result, mask))
    return outputs


def _attended(result: Any, mask: torch.Tensor) -> Outputs:
    """Name the outputs of a causal language model, with zeros where there is only padding."""
    attended = mask.bool()
    logits = result.logits.masked_fill(~attended[:, -result.logits.shape[1] :, None], 0)
    outputs = {"logits": logits.numpy()}
    for index, layer in enumerate(result.past_key_values.layers):
        for kind, states in (("key", layer.keys), ("value", layer.values)):
            hidden = ~attended[:, None, -states.shape[2] :, None]
            outputs[f"present.{index}.{kind}"] = states.masked_fill(hidden, 0).numpy()
    return outputs


def _named(result: Any) -> Outputs:
    return {
        path_name(path) or "output": leaf.numpy()
        for path, leaf in flatten_with_paths(result)
        if isinstance(leaf, torch.Tensor)
    }


def relative_errors(found: Sequence[Outputs], expected: Sequence[Outputs]) -> list[float]:
    """Give, for each call, the largest max |a - b| / max |b| over its outputs."""
    errors = []
    for outputs, references in zip(found, expected, strict=True):
        if outputs.keys() != references.keys():
            raise ValueError(f"outputs are {sorted(outputs)}, torch gives {sorted(references)}")
        errors.append(max(_relative_error(name, outputs[name], references[name]) for name in outputs))
    return errors


def _relative_error(name: str, output: Array, reference: Array) -> float:
    if name.startswith("present."):
        # torch's sliding layers forget what is outside their window; the graph's mask hides it.
        output = output[:, :, output.shape[2] - reference.shape[2] :]
    if output.shape != reference.shape:
        raise ValueError(f"{name} is {output.shape}, torch gives {reference.shape}")
    if not np.isfinite(output).all():
        raise ValueError(f"{name} is not finite")
    return float(np.abs(output - reference).max() / max(np.abs(reference).max(), np.finfo(np.float32).tiny))


def compiled(model: ir.Model, folder: Path) -> Callable[..., Any]:
    """Save the model, load it again, and make it callable like the module."""
    path = folder / "model.onnx"
    planish.ir.save(model, path)
    proto = ir.to_proto(planish.ir.load(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    signature = model.meta[META_KEY]

    def call(**inputs: Any) -> Any:
        feeds = {name: tensor.numpy() for name, tensor in flatten_inputs(signature, (), inputs).items()}
        outputs = session.run(list(signature.output_names), feeds)
        return unflatten_outputs(signature, [torch.from_numpy(output) for output in outputs])

    return call


def names_kept(module: torch.nn.Module, model: ir.Model) -> str:
    """Count the module's parameters that are found in the model under one of their names."""
    present = set(model.graph.initializers)
    for value in model.graph.initializers.values():
        present |= set(value.metadata_props.get("planish.tied_names", "").split(","))
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    return f"{sum(name in present for name in names)}/{len(names)}"


def dynamic_dims(model: ir.Model) -> str:
    """List the dynamic dimensions of the inputs."""
    dims: dict[str, None] = {}
    for value in model.graph.inputs:
        dims.update(dict.fromkeys(str(d) for d in value.shape or () if isinstance(d, ir.SymbolicDim)))
    return ", ".join(dims)


def table(rows: Sequence[Row]) -> Table:
    """Lay the rows out for the terminal."""
    result = Table(title="Tracing")
    for column in COLUMNS:
        result.add_column(column)
    for row in rows:
        result.add_row(*cells(row), style="" if row.passed else "red")
    return result


def cells(row: Row) -> list[str]:
    """Spell one row."""
    single = {name: row.operations[name] for name in SINGLE_NODES if row.operations[name]}
    return [
        row.name,
        *(str(row.nodes.get(stage, "")) for stage in STAGES),
        f"{row.seconds.get('trace', 0):.1f} + {sum(row.seconds.values()) - row.seconds.get('trace', 0):.1f}",
        row.failure or "; ".join(" ".join(f"{e:.0e}" for e in errors) for errors in row.errors.values()),
        row.names_kept,
        ", ".join(f"{count} {name}" for name, count in single.items()),
        row.dims,
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Write the table as Markdown."""
    passed = sum(row.passed for row in rows)
    lines = [
        "# Tracing",
        "",
        f"{passed} of {len(rows)} architectures agree with torch to {TOLERANCE:g} after tracing, passes,",
        "saving and reloading, at sizes other than the traced ones.",
        "",
        "Made by `benchmarks/tracing.py` from small random models. Seconds: tracing + passes. The",
        "error of a call is the largest max |a - b| / max |b| over its outputs; each call has another size.",
        "Causal language models are called with three left-padded prompts, one more token each, six more",
        "tokens each, and anew with a prompt of one token and one more token.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", action="append", metavar="NAME", help="one architecture; may be repeated")
    parser.add_argument("--every-stage", action="store_true", help="compare with torch after each stage")
    arguments = parser.parse_args()
    chosen = [by_name(name) for name in arguments.only or ()] or ARCHITECTURES
    console = Console()
    wide = Console(width=240)
    rows = []
    for architecture in chosen:
        rows.append(measure(architecture, every_stage=arguments.every_stage))
        console.print(" | ".join(cells(rows[-1])), style="" if rows[-1].passed else "red", soft_wrap=True)
    wide.print(table(rows))
    if not arguments.only:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(markdown(rows), encoding="utf-8")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
