"""Is structured OBS exact? The four statements that pruning rests on, on random transformers.

A BERT-like encoder (plain FFN, heads, biases, norms behind the branches) and a Llama-like decoder (gated FFN,
groups of heads that share keys and values) are traced and run on random tokens; then, for every group:

1. *refit*: the weights of every level equal the least-squares solution of the columns that are left, found by
   ``numpy.linalg.lstsq`` from the layer's inputs themselves, in float64;
2. *score*: half of the published score, with H = 2/n Σ xxᵀ, is the squared error that removing the structure
   causes, each structure on its own;
3. *zero structures*: shrinking away structures whose consumers' columns are zero changes no output;
4. *stitched and shrunk*: a model of full shape with zeros, and the shrunk one, have the same outputs, at
   random levels of all groups together; so have the losses of the search's session and of the shrunk model.

    python benchmarks/pruning_oracles.py                     # writes benchmarks/results/pruning_oracles.md
    python benchmarks/pruning_oracles.py --output FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import planish
import torch
import transformers
from planish.codegen import get_target
from planish.ir import clone
from planish.ir.structure import ChannelGroup, Choice, Structure, discover, shrink
from planish.passes.infrastructure.base import PassContext
from planish.passes.prune.consumers import ConsumerLayer, find_consumers
from planish.passes.prune.database import Database, build_database
from planish.passes.prune.obs import Consumer, refits, removal
from planish.runtime.calibration import ActivationStream, CalibrationData
from planish.runtime.calibration.data import fitted
from planish.runtime.sensitivity import WeightSensitivity
from planish.runtime.session import Session
from planish.runtime.stitched_model import StitchedModel
from rich.console import Console
from rich.table import Table

Array = np.ndarray[Any, Any]

RESULTS = Path(__file__).parent / "results" / "pruning_oracles.md"
VOCABULARY, HIDDEN, LAYERS, HEADS = 200, 96, 2, 8
BATCHES, SEQUENCE = 24, 64
FLOAT64, FLOAT32 = 1e-8, 1e-5
"""Relative deviations that are allowed: normal equations in float64; sums in another order in float32."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One statement on one model: its largest deviation among so many comparisons."""

    model: str
    statement: str
    structures: str
    comparisons: int
    deviation: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether no deviation is larger than allowed."""
        return self.deviation <= self.allowed

    def cells(self) -> list[str]:
        """A row of the table."""
        verdict = "yes" if self.holds else "NO"
        return [
            self.model,
            self.statement,
            self.structures,
            f"{self.comparisons}",
            f"{self.deviation:.1e}",
            f"{self.allowed:.0e}",
            verdict,
        ]


COLUMNS = [
    "model",
    "statement",
    "structures",
    "comparisons",
    "largest relative deviation",
    "allowed",
    "holds",
]


def encoder() -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=SEQUENCE,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def decoder() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=SEQUENCE,
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"encoder": encoder, "decoder": decoder}


class Subject:
    """A random model in canonical form, with data and its groups."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        module = MODELS[name]().eval()
        with torch.no_grad():
            # Fresh biases are zero, and fresh weights so small that nothing is far from linear.
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        ids = np.random.default_rng(0).integers(0, VOCABULARY, (BATCHES, 1, SEQUENCE))
        examples = [{"input_ids": batch, "attention_mask": np.ones_like(batch)} for batch in ids]
        first = {key: torch.from_numpy(array) for key, array in examples[0].items()}
        options = {"example_inputs": first} if name == "encoder" else {}
        self.model: ir.Model = planish.compile(module, "canonicalize", target="portable", **options).model
        self.data = CalibrationData.read(examples, self.model)
        self.structure: Structure = discover(self.model)
        self.groups = [group for group in self.structure.groups if group.kind != "hidden"]

    def kind(self, group: ChannelGroup) -> str:
        """What the group's structures are called."""
        if group.kind == "ffn":
            return "columns"
        return "heads" if self.name == "encoder" else "key-value groups"

    def layer(self, group: ChannelGroup) -> tuple[ConsumerLayer, Array, Array]:
        """The group's consumer, its weight [out, in], and its inputs [tokens, in], in float64."""
        (layer,), _ = find_consumers(self.model, group)
        weight = self.model.graph.initializers[layer.name].const_value
        assert weight is not None
        stream = ActivationStream(self.model, self.data)
        rows = [tap.rows(layer.inputs[0]) for tap in stream.advance([layer.inputs[0]])]
        return layer, layer.matrix(weight.numpy()).astype(np.float64), np.concatenate(rows).astype(np.float64)

    def outputs(self, model: ir.Model) -> Array:
        """The model's first output on all the data."""
        session = Session(model)
        name = str(model.graph.outputs[0].name)
        return np.concatenate([session.run(fitted(feeds, model))[name] for feeds in self.data])


def checks(subject: Subject) -> Iterator[Check]:
    """All statements about one model."""
    for statement, of_group in (
        ("refit = least squares", refit_deviations),
        ("score / 2 = error", score_deviations),
    ):
        found: dict[str, list[float]] = {}
        for group in subject.groups:
            found.setdefault(subject.kind(group), []).extend(of_group(subject, group))
        for structures, deviations in found.items():
            yield Check(subject.name, statement, structures, len(deviations), max(deviations), FLOAT64)
    yield zero_structures(subject)
    with tempfile.TemporaryDirectory() as folder:
        yield from stitched_and_shrunk(subject, Path(folder))


def least_squares(inputs: Array, outputs: Array, columns: Array) -> tuple[Array, float]:
    """The weight [out, columns] and the mean squared error of the best fit of these columns."""
    solution = np.linalg.lstsq(inputs[:, columns], outputs)[0]
    return solution.T, float(np.square(inputs[:, columns] @ solution - outputs).sum() / len(inputs))


def refit_deviations(subject: Subject, group: ChannelGroup) -> Iterator[float]:
    """‖Ŵ − Ŵ_lstsq‖ / ‖Ŵ_lstsq‖ at ten levels; the bias is a column of ones where there is one."""
    layer, weight, inputs = subject.layer(group)
    has_bias = layer.bias is not None
    centered = inputs - inputs.mean(axis=0) if has_bias else inputs
    consumer = Consumer(weight, centered.T @ centered / len(inputs), layer.columns)
    counts = sorted({max(1, round(group.structures * share / 10)) for share in range(1, 11)})
    order = removal([consumer], counts[0], damp=0.0)
    if order.damp != (0.0,):
        raise SystemExit(f"{group.name}: the inputs are too few or too much alike for an exact comparison")
    for refit in refits(consumer, order, counts):
        columns = layer.columns[refit.keep].reshape(-1)
        expected, _ = least_squares(centered, centered @ weight.T, columns)
        yield float(np.linalg.norm(refit.weight - expected) / np.linalg.norm(expected))


def score_deviations(subject: Subject, group: ChannelGroup) -> Iterator[float]:
    """|score / 2 − error| / error of removing each of up to 16 structures alone."""
    layer, weight, inputs = subject.layer(group)
    inverse = np.linalg.inv(2 * inputs.T @ inputs / len(inputs))
    for structure in range(0, group.structures, max(1, group.structures // 16)):
        own = layer.columns[structure]
        block = np.linalg.inv(inverse[np.ix_(own, own)])
        score = np.trace(weight[:, own] @ block @ weight[:, own].T)
        left = np.delete(layer.columns, structure, axis=0).reshape(-1)
        _, error = least_squares(inputs, inputs @ weight.T, left)
        yield float(abs(score / 2 - error) / error)


def zero_structures(subject: Subject) -> Check:
    """A quarter of every group's structures is made to matter nothing, and shrunk away."""
    rng = np.random.default_rng(1)
    choices = []
    for group in subject.groups:
        gone = rng.choice(group.structures, group.structures // 4, replace=False)
        choices.append(Choice(group, np.setdiff1d(np.arange(group.structures), gone)))
    return _same_outputs(subject, masked(subject, choices), choices, "zero structures change nothing")


def masked(subject: Subject, choices: list[Choice]) -> ir.Model:
    """The model in its full shape, with zeros for what the consumers read of structures that go."""
    model = clone(subject.model)
    for choice in choices:
        gone = np.setdiff1d(np.arange(choice.group.structures), choice.keep)
        for name, array in choice.weights.items():
            _set(model, name, array)
        for member in choice.group.consumers:
            tensor = model.graph.initializers[member.tensor].const_value
            assert tensor is not None
            weight = np.moveaxis(np.array(tensor.numpy()), member.axis, 0)
            weight[member.indices[gone].reshape(-1)] = 0
            _set(model, member.tensor, np.moveaxis(weight, 0, member.axis))
    return model


def _set(model: ir.Model, name: str, array: Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(np.ascontiguousarray(array), name=name)


def _same_outputs(subject: Subject, full: ir.Model, choices: list[Choice], statement: str) -> Check:
    shrunk = clone(full)
    shrink(shrunk, [Choice(choice.group, choice.keep) for choice in choices])
    if parameters(shrunk) >= parameters(full):
        raise SystemExit(f"{subject.name}: shrinking removed nothing, so that nothing would be compared")
    expected, found = subject.outputs(full), subject.outputs(shrunk)
    deviation = float(np.abs(found - expected).max() / np.abs(expected).max())
    return Check(subject.name, statement, "all groups", expected.size, deviation, FLOAT32)


def parameters(model: ir.Model) -> int:
    """How many numbers the model's weights hold."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return sum(tensor.size for tensor in tensors if tensor is not None)


def stitched_and_shrunk(subject: Subject, folder: Path) -> Iterator[Check]:
    """Random levels of all groups together, with refitted weights."""
    levels = {group.name: [*range(group.structures, 0, -1)] for group in subject.groups}
    ctx = PassContext(target=get_target("portable"), calibration=subject.data)
    database = build_database(
        subject.model, subject.structure, levels, criterion="obs", damp=1e-2, ctx=ctx, folder=folder
    )
    draws = [random_choices(subject, database, np.random.default_rng(seed)) for seed in range(5)]
    found = [
        _same_outputs(subject, masked(subject, draw), draw, "stitched = shrunk: outputs") for draw in draws
    ]
    worst = max(found, key=lambda check: check.deviation)
    yield dataclasses.replace(worst, comparisons=sum(check.comparisons for check in found))
    stitched = StitchedModel(subject.model, subject.structure, subject.groups, subject.data)
    deviations = []
    for draw in draws:
        expected = loss_of_shrunk(subject, draw)
        deviations.append(abs(stitched.loss(draw, []) - expected) / expected)
    yield Check(subject.name, "stitched = shrunk: losses", "all groups", len(draws), max(deviations), FLOAT32)


def random_choices(subject: Subject, database: Database, rng: np.random.Generator) -> list[Choice]:
    return [database.choice(group, int(rng.integers(1, group.structures))) for group in subject.groups]


def loss_of_shrunk(subject: Subject, choices: list[Choice]) -> float:
    """How far the outputs of the shrunk model are from the dense ones."""
    shrunk = clone(subject.model)
    shrink(shrunk, choices)
    session = Session(shrunk)
    measure = WeightSensitivity(subject.model, [], subject.data)
    return measure.change(session.run(fitted(feeds, shrunk)) for feeds in subject.data)


def write_markdown(path: Path, found: list[Check]) -> None:
    """The table as the repository keeps it."""
    lines = [
        "# Exact oracles of structured pruning",
        "",
        f"Random models, {LAYERS} layers, hidden size {HIDDEN}, FFN {2 * HIDDEN}, {HEADS} heads (the "
        f"decoder: {HEADS // 2} groups of two), {BATCHES * SEQUENCE} random tokens. Refits and scores: "
        "float64, without damping, against `numpy.linalg.lstsq` on the layers' inputs. Outputs: float32 in "
        "onnxruntime, relative to the largest one; 0 where its products add in the order of the columns, so "
        "that a zero in between changes no bit.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *("| " + " | ".join(check.cells()) + " |" for check in found),
        "",
        "Written by `benchmarks/pruning_oracles.py`.",
        "",
    ]
    path.write_text("\n".join(lines))


def main() -> None:
    """Check every statement on every model and write the table; fails if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="the table's file")
    arguments = parser.parse_args()
    found = [check for name in MODELS for check in checks(Subject(name))]
    table = Table(*COLUMNS)
    for check in found:
        table.add_row(*check.cells())
    Console(width=140).print(table)
    write_markdown(arguments.output, found)
    if not all(check.holds for check in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
