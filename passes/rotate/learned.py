"""R1 and R2 by learning: the rotations under which quantised activations hurt the model least.

    minimise over orthogonal R1, R2:   loss(model rotated by R1 and R2, activations rounded to a few bits)

The model is lowered to torch.fx with the rotations as arguments: W ↦ R1ᵀ W or W R1 on the way from each
weight to its linear, so that the loss can be differentiated by the rotations alone (`turned_module`).
Gradients pass the rounding as if it were not there (Bengio et al., 2013). The matrices start as random
Hadamard rotations and move by `CayleySGD`.

SpinQuant (Liu et al., 2024): cross-entropy of the next token, learning rate 1.5 that falls to zero, 100 steps
of 8 sequences, activations of 4 bits and weights left alone. Here the divergence from the dense model is the
default, whose gradients are smaller and take larger rates; and learning begins with the best of several
random rotations on the first data.

Preconditions: those of R1 (`residual`) and R2 (`values`). Online rotations (R3, R4) that will be used must be
in the model already, so that the others are learned for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
import torch.nn.functional as F

from ...codegen.torch_fx import INPUTS_KEY, lower, run
from ...ir.errors import InputError, MissingDataError, PassError
from ...ir.views import AttentionBlock, attentions, linears
from .cayley import CayleySGD
from .change import Change
from .hadamard import rotation
from .heads import output_rows, value_columns
from .learning_memory import LearnedRotations, LearningMemory, Matrix, Position
from .residual import residual_rotations
from .turned_module import Turn, turned_module
from .values import value_rotations
from .vectors import VectorFunction

Feeds = Mapping[str, npt.NDArray[Any]]
Objective = Literal["next-token", "distillation", "output"]
Progress = Callable[[Sequence[int]], Iterator[int]]

_LOGITS, _IDS, _MASK = "logits", "input_ids", "attention_mask"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learning:
    """How rotations are learned.

    Attributes:
        steps: updates of the rotations.
        sequences: sequences per update, at least.
        learning_rate: of the first update; it falls to zero along half a cosine.
        starts: sets of random rotations that are drawn; learning begins with the best of them.
        momentum: how much of the last direction is kept.
        activation_bits: inputs of linears are rounded to so many bits per token, symmetrically.
        weight_bits: weights are rounded too, per output channel, symmetrically; None leaves them alone.
        ignore: names of linears whose inputs and weights are not rounded.
        objective: ``next-token`` is the language model's cross-entropy; ``distillation`` the divergence of
            the logits from the dense model's; ``output`` the relative squared error of the first output. None
            is ``distillation`` for a model from ``input_ids`` to ``logits`` and ``output`` for others.
    """

    steps: int = 100
    sequences: int = 8
    learning_rate: float = 100.0
    starts: int = 4
    momentum: float = 0.0
    activation_bits: int = 4
    weight_bits: int | None = None
    ignore: tuple[str, ...] = ("lm_head",)
    objective: Objective | None = None


def learn_rotations(
    model: ir.Model,
    feeds: Sequence[Feeds],
    *,
    rng: np.random.Generator,
    learning: Learning | None = None,
    progress: Progress = iter,
    memory: LearningMemory | None = None,
) -> LearnedRotations:
    """Learn R1 of every residual stream and R2 of every attention.

    Args:
        model: canonical, with norms folded, and with the online rotations that will be used; not changed.
        feeds: complete feeds by graph-input name, small batches of sequences; drawn in random order. A tenth
            is kept to compare the learned rotations with the first ones; all, if there is only one.
        rng: draws the first rotations and the order of the feeds.
        learning: how.
        progress: iterates over the numbers of the steps and shows how far it is.
        memory: keeps where learning is; it goes on where an earlier run was interrupted.

    Raises:
        PassError: the model allows no rotation, or the loss is not finite.
        InputError: there are no feeds, or the objective does not fit the model.
    """
    learning = learning or Learning()
    turns = find_turns(model)
    if not turns:
        raise PassError("rotate: the model allows neither R1 nor R2", hint="run fold-norms first")
    if not feeds:
        raise MissingDataError("rotate: learning rotations needs calibration data")
    loss = _Loss(model, turns, learning)
    kept = max(1, len(feeds) // 10)
    seen, held_out = feeds[: len(feeds) - kept] or feeds, feeds[len(feeds) - kept :]
    drawn = [[_first_matrix(turn, rng) for turn in turns] for _ in range(max(1, learning.starts))]
    position = None if memory is None else memory.position()
    if position is None:
        position = _beginning(loss, drawn, seen[:kept], held_out)
    matrices = [torch.tensor(matrix, requires_grad=True) for matrix in position.matrices]
    optimizer = CayleySGD(matrices, momentum=learning.momentum, directions=position.directions)
    batches = _batches(seen, learning.sequences, rng)
    losses = list(position.losses)
    for step in progress(range(learning.steps)):
        batch = next(batches)
        if step < len(position.losses):
            continue
        losses.append(loss.add_gradients(batch, matrices))
        if not math.isfinite(losses[-1]):
            raise PassError(f"rotate: the loss is {losses[-1]} at step {step} of learning")
        optimizer.step(learning.learning_rate * (1 + math.cos(math.pi * step / learning.steps)) / 2)
        if memory is not None and memory.is_due():
            memory.keep(
                dataclasses.replace(
                    position, matrices=_arrays(matrices), directions=optimizer.directions, losses=losses
                )
            )
    before, first = position.before, [torch.from_numpy(matrix) for matrix in position.first]
    after = loss.mean(held_out, matrices)
    learned = matrices if after < before else first
    by_label = {turn.label: matrix.detach().numpy() for turn, matrix in zip(turns, learned, strict=True)}
    return LearnedRotations(by_label, tuple(losses), (before, after))


def _beginning(
    loss: _Loss, drawn: Sequence[list[torch.Tensor]], seen: Sequence[Feeds], held_out: Sequence[Feeds]
) -> Position:
    """Learning begins with the best of the drawn sets."""
    best = min(drawn, key=lambda start: loss.mean(seen, start)) if len(drawn) > 1 else drawn[0]
    first = _arrays(best)
    still = [np.zeros_like(matrix) for matrix in first]
    return Position(first, first, still, loss.mean(held_out, best), ())


def _arrays(matrices: Sequence[torch.Tensor]) -> list[Matrix]:
    return [matrix.detach().numpy().copy() for matrix in matrices]


def find_turns(model: ir.Model) -> list[Turn]:
    """The rotations R1 and R2 that the model allows, and what each of them turns."""
    turns = [_whole_turn(change) for change in residual_rotations(model, _identity)[0]]
    by_label = {change.label: change for change in value_rotations(model, _identity, across_heads=False)[0]}
    for block in attentions(model):
        change = None if block.v is None else by_label.get(f"R2 {block.v.name}")
        if change is not None:
            turns.append(_turn_of_heads(change, block, model))
    return turns


def _identity(features: int, label: str) -> tuple[VectorFunction, tuple[str, ...]]:
    del features, label
    return lambda vectors: vectors, ()


def _whole_turn(change: Change) -> Turn:
    vectors = list(dict.fromkeys(vector for edit in change.edits for vector in edit.vectors))
    # Several nodes may read one constant, which is turned once.
    unique = {(vector.value, vector.axis % len(vector.value.shape or ())): vector for vector in vectors}
    shape = vectors[0].value.shape
    assert shape is not None
    size = shape[vectors[0].axis]
    assert isinstance(size, int)
    return Turn(change.label, size, tuple((vector, None) for vector in unique.values()))


def _turn_of_heads(change: Change, block: AttentionBlock, model: ir.Model) -> Turn:
    written, read = change.edits
    _, columns = value_columns(block, linears(model))
    _, rows = output_rows(block)
    operands = [(vector, columns) for vector in written.vectors] + [(vector, rows) for vector in read.vectors]
    return Turn(change.label, columns.shape[1], tuple(operands))


def _first_matrix(turn: Turn, rng: np.random.Generator) -> torch.Tensor:
    kind: Literal["random-hadamard", "random-matrix"] = (
        "random-matrix" if turn.size % 2 else "random-hadamard"
    )
    return torch.from_numpy(rotation(turn.size, kind, rng).matrix).clone().requires_grad_()


def _batches(feeds: Sequence[Feeds], sequences: int, rng: np.random.Generator) -> Iterator[list[Feeds]]:
    """Feeds that hold at least so many sequences, over and over, each round in another order."""
    batch: list[Feeds] = []
    while True:
        for index in rng.permutation(len(feeds)):
            batch.append(feeds[index])
            if sum(map(_sequences, batch)) >= sequences:
                yield batch
                batch = []


def _sequences(item: Feeds) -> int:
    return max(1, next((len(array) for array in item.values() if array.ndim), 1))


class _Loss:
    """The loss of the rotated and rounded model as a function of the rotations."""

    def __init__(self, model: ir.Model, turns: Sequence[Turn], learning: Learning) -> None:
        self._objective = _objective(model, learning)
        self._output = str(model.graph.outputs[0].name) if self._objective == "output" else _LOGITS
        self._dense = None if self._objective == "next-token" else lower(model, dtype=torch.float32)
        self._module = turned_module(
            model,
            turns,
            activation_bits=learning.activation_bits,
            weight_bits=learning.weight_bits,
            ignore=learning.ignore,
            output=self._output,
        )

    def mean(self, batch: Sequence[Feeds], matrices: Sequence[torch.Tensor]) -> float:
        """The mean loss over ``batch``."""
        with torch.no_grad():
            losses = [float(self._of(item, matrices)) * _sequences(item) for item in batch]
        return sum(losses) / sum(map(_sequences, batch))

    def add_gradients(self, batch: Sequence[Feeds], matrices: Sequence[torch.Tensor]) -> float:
        """Add the gradients of the mean loss over ``batch`` to the matrices'; returns the loss."""
        total, count = 0.0, sum(map(_sequences, batch))
        for item in batch:  # one after the other: their activations need not be held together
            loss = self._of(item, matrices) * (_sequences(item) / count)
            loss.backward()
            total += loss.item()
        return total

    def _of(self, item: Feeds, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        names = self._module.meta[INPUTS_KEY]
        arguments = {argument: torch.as_tensor(np.asarray(item[name])) for name, argument in names.items()}
        arguments |= {f"rotation_{number}": matrix.float() for number, matrix in enumerate(matrices)}
        found: torch.Tensor = self._module(**arguments)[self._output]
        if self._dense is None:
            return next_token_loss(found, item)
        with torch.no_grad():
            expected: torch.Tensor = run(self._dense, item)[self._output]
        if self._objective == "output":
            return (found - expected).square().sum() / expected.square().sum()
        return divergence(found, expected, item)


def _objective(model: ir.Model, learning: Learning) -> Objective:
    names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    is_language_model = {_IDS, _LOGITS} <= names
    if learning.objective is None:
        return "distillation" if is_language_model else "output"
    if learning.objective != "output" and not is_language_model:
        raise InputError(
            f"rotate: objective={learning.objective} needs a model from {_IDS!r} to {_LOGITS!r}",
            hint="objective=output serves any model",
        )
    return learning.objective


def next_token_loss(logits: torch.Tensor, item: Feeds) -> torch.Tensor:
    """Mean cross-entropy of each token's logits with the token after it; padding is left out."""
    ids = torch.as_tensor(np.asarray(item[_IDS]))
    real = _real_tokens(item, logits)
    counted = real[:, :-1] & real[:, 1:]
    return F.cross_entropy(logits[:, :-1][counted], ids[:, 1:][counted])


def divergence(logits: torch.Tensor, expected: torch.Tensor, item: Feeds) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the predictions from the expected ones; padding is left out."""
    real = _real_tokens(item, logits)
    found, wanted = (torch.log_softmax(each[real], -1) for each in (logits, expected))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def _real_tokens(item: Feeds, logits: torch.Tensor) -> torch.Tensor:
    batch, length = logits.shape[:2]
    mask = item.get(_MASK)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool)
    return torch.as_tensor(np.asarray(mask)[:, -length:].astype(bool))
