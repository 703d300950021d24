"""How exact are `fold-norms` and `rotate`? Logits in float64 before and after, for eight architectures.

Small random models of transformers are traced, and all their floats made float64: weights, constants, casts
and declared types. Every stage of ``untie, fold, R1, R2, R3, R4`` is run on top of what it needs, and all of
them together for every kind of rotation. The reference evaluator of the onnx package runs the graphs: its
kernels are written in numpy, and compute in the type of their inputs.

A batch of three prompts with padding on the left runs first; then one more token of each, which reads the
cache that the changed model has written: rotated keys and values must meet rotated queries and projections.

    python benchmarks/exactness.py            # writes benchmarks/results/exactness.md
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import onnx_ir as ir
import torch
import transformers
from planish import trace_causal_lm
from planish.codegen import get_target
from planish.ir import clone, ops
from planish.ir.errors import NothingCoveredError
from planish.ir.walk import all_nodes, all_values, replace_tensors
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.pipeline import Pipeline

TOLERANCE = 1e-10
"""Of |Δlogit| / max |logit|: float64 has an epsilon of 2e-16, and a chain of sums loses a few digits."""
RESULTS = Path(__file__).parent / "results" / "exactness.md"

Arrays = dict[str, np.ndarray[Any, Any]]

VOCABULARY, LAYERS, HEADS, BATCH = 96, 2, 4, 3
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS} | SPECIAL_TOKENS
# 24 = 2 · 12 and 40 = 2 · 20 need Hadamard matrices of orders that are no powers of two.
GROUPED = PLAIN | {
    "hidden_size": 24, "intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A small random model, and what it is here for."""

    name: str
    has: str
    build: Callable[[], torch.nn.Module]

    def module(self) -> torch.nn.Module:
        """Build the model; all parameters are perturbed: fresh norms have weights of one and no bias."""
        torch.manual_seed(0)
        module = self.build().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        return module


def _model(kind: str, suffix: str = "ForCausalLM", **options: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        config = getattr(transformers, f"{kind}Config")(**options)
        model: torch.nn.Module = getattr(transformers, f"{kind}{suffix}")(config)
        return model

    return build


ARCHITECTURES = (
    Architecture("Llama", "grouped queries, free head_dim", _model("Llama", **GROUPED, head_dim=8)),
    Architecture("Qwen2", "biases of q, k, v", _model("Qwen2", **GROUPED | {"hidden_size": 32})),
    Architecture("Qwen3", "norms of q and k", _model("Qwen3", **GROUPED, head_dim=8)),
    Architecture("Gemma", "norms of 1 + w, scaled tied embedding", _model("Gemma", **GROUPED, head_dim=8)),
    Architecture("Gemma 2", "norms behind branches", _model("Gemma2", **GROUPED, head_dim=8)),
    Architecture(
        "GPT-2",
        "LayerNorm, biases, learned positions, fused qkv, tied embedding",
        _model(
            "GPT2", "LMHeadModel", vocab_size=VOCABULARY, n_embd=24, n_layer=LAYERS, n_head=HEADS,
            n_positions=64, n_inner=40, **SPECIAL_TOKENS,
        ),
    ),
    Architecture(
        "OPT",
        "LayerNorm, biases, learned positions, tied embedding",
        _model(
            "OPT", **PLAIN, hidden_size=24, word_embed_proj_dim=24, ffn_dim=40, max_position_embeddings=64
        ),
    ),
    Architecture("Phi-3", "fused qkv and gate_up", _model("Phi3", **GROUPED | {"hidden_size": 32})),
)  # fmt: skip


def in_float64(model: ir.Model) -> None:
    """Make every float of the model a float64, in place: weights, constants, casts and declared types."""
    replace_tensors(model, _widened)
    for value in all_values(model):
        if value.dtype is not None and value.dtype.is_floating_point():
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for node in all_nodes(model):
        target = node.attributes.get("to")
        if node.op_type == "Cast" and target is not None and ir.DataType(target.as_int()).is_floating_point():
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.DOUBLE))


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not tensor.dtype.is_floating_point():
        return tensor
    return ir.tensor(tensor.numpy().astype(np.float64), name=tensor.name)


class Runner:
    """Runs a graph in the types that it declares: two calls, the second with the cache of the first."""

    def __init__(self, model: ir.Model) -> None:
        model = clone(model)
        ops.inline(model)
        self._evaluator = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
        self._past = {
            value.name: (value.shape[1], value.shape[3])
            for value in model.graph.inputs
            if value.name.startswith("past_key_values")
        }

    def logits(self) -> list[np.ndarray[Any, Any]]:
        """Logits of a batch of left-padded prompts, and of one further token of each."""
        rng = np.random.default_rng(0)
        mask = np.ones((BATCH, 7), np.int64)
        mask[0, :4], mask[1, :1] = 0, 0
        past = {name: np.zeros((BATCH, heads, 0, size)) for name, (heads, size) in self._past.items()}
        prompt = self._run(rng.integers(3, VOCABULARY, mask.shape), mask, past)
        past = {name: prompt[name.replace("past_key_values", "present")] for name in past}
        mask = np.concatenate([mask, np.ones((BATCH, 1), np.int64)], axis=1)
        step = self._run(rng.integers(3, VOCABULARY, (BATCH, 1)), mask, past)
        return [prompt["logits"], step["logits"]]

    def _run(self, ids: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], past: Arrays) -> Arrays:
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions} | past
        feeds = {name: array for name, array in feeds.items() if name in self._evaluator.input_names}
        return dict(zip(self._evaluator.output_names, self._evaluator.run(None, feeds), strict=True))


def relative_error(after: list[np.ndarray[Any, Any]], before: list[np.ndarray[Any, Any]]) -> float:
    """max |Δlogit| / max |logit| over all calls; infinite where a logit is not finite."""
    if not all(np.isfinite(array).all() for array in after):
        return float("inf")
    differences = (
        np.abs(new - old).max() / np.abs(old).max() for new, old in zip(after, before, strict=True)
    )
    return float(max(differences))


# By stage: whether the linears of the graph are merged first (by the fuse pass), and the passes to be judged.
STAGES: dict[str, tuple[bool, str]] = {
    "untie": (False, "canonicalize{untie=true}"),
    "fold": (False, "fold-norms"),
    "R1": (False, "fold-norms,rotate{rotations=[R1],kind=random-hadamard}"),
    "R2": (False, "rotate{rotations=[R2],kind=random-hadamard}"),
    "R3": (False, "rotate{rotations=[R3]}"),
    "R4": (False, "rotate{rotations=[R4]}"),
    "all, hadamard": (False, "fold-norms,rotate"),
    "all, random-hadamard": (False, "fold-norms,rotate{kind=random-hadamard}"),
    "all, random-matrix": (False, "fold-norms,rotate{kind=random-matrix}"),
    "all, and across heads": (False, "fold-norms,rotate{across_heads=true}"),
    "all, linears merged": (True, "fold-norms,rotate{kind=random-hadamard}"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One architecture: its errors by stage (None where the stage covers nothing), and what was left out."""

    architecture: Architecture
    errors: dict[str, float | None]
    left_out: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """All that was done is within the tolerance."""
        return all(error <= TOLERANCE for error in self.errors.values() if error is not None)


def measure(architecture: Architecture) -> Row:
    """Trace the model, and run every stage on it."""
    canonical = trace_causal_lm(architecture.module())
    target = get_target("portable")
    run_pipeline(canonical, Pipeline.of("canonicalize"), target=target)
    merged = clone(canonical)
    run_pipeline(merged, Pipeline.of("fuse"), target=target)
    for model in (canonical, merged):
        in_float64(model)
    references = {False: Runner(canonical).logits(), True: Runner(merged).logits()}
    errors: dict[str, float | None] = {}
    left_out: dict[str, None] = {}
    for stage, (is_merged, passes) in STAGES.items():
        model = clone(merged if is_merged else canonical)
        try:
            report = run_pipeline(model, Pipeline.of(passes), target=target)
        except NothingCoveredError as error:
            errors[stage] = None
            left_out[f"{stage}: {error.message}"] = None
            continue
        errors[stage] = relative_error(Runner(model).logits(), references[is_merged])
        coverages = (each.coverage for each in report.passes if each.coverage is not None)
        left_out |= {str(coverage): None for coverage in coverages if coverage.skipped}
    return Row(architecture, errors, tuple(left_out))


def table(rows: Sequence[Row]) -> str:
    """The results as Markdown."""
    worst = max(error for row in rows for error in row.errors.values() if error is not None)
    header = ["model", "it has", *STAGES]
    lines = [
        "# Exactness of fold-norms and rotate",
        "",
        "Written by `benchmarks/exactness.py`. Largest |Δlogit| / max |logit| in float64 against the graph",
        "before the stage: a batch of left-padded prompts, then one more token of each through the cache.",
        f"All parameters are perturbed. Allowed: {TOLERANCE:.0e}. Largest found: {worst:.1e}.",
        "",
        "| " + " | ".join(header) + " |",
        "|" + " --- |" * len(header),
    ]
    for row in rows:
        cells = ["–" if error is None else f"{error:.0e}" for error in row.errors.values()]
        lines.append("| " + " | ".join([row.architecture.name, row.architecture.has, *cells]) + " |")
    lines += ["", "What the passes left alone, and why:", ""]
    lines += [f"- {row.architecture.name}: {text}" for row in rows for text in row.left_out]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure all architectures, write the table, and fail if one is not exact."""
    transformers.logging.set_verbosity_error()
    rows = []
    for architecture in ARCHITECTURES:
        rows.append(measure(architecture))
        errors = ", ".join(f"{stage} {error}" for stage, error in rows[-1].errors.items())
        print(f"{architecture.name}: {errors}", flush=True)
    RESULTS.write_text(table(rows), encoding="utf-8")
    inexact = [row.architecture.name for row in rows if not row.is_exact]
    if inexact:
        print(f"not exact: {', '.join(inexact)}")
    return 1 if inexact else 0


if __name__ == "__main__":
    sys.exit(main())
