"""What passes that train have in common: their options, the weights they train, what they report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from ...ir.errors import MissingDataError, PipelineError
from ...runtime.training import (
    Hook,
    Losses,
    Trained,
    Training,
    Weight,
    train,
)
from ...runtime.training.losses import OutputKind
from ...runtime.training.schedule import Decay
from ..infrastructure.base import Contract, Fact, Pass, PassContext
from ..infrastructure.patterns import matches


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPass(Pass):
    """Base of passes that train weights to do as the model before compression does.

    Attributes:
        steps: updates of the weights.
        learning_rate: of AdamW, at its highest.
        batch: samples per update; batches of the training data are taken apart and put together to this size
            where their inputs share a batch axis. Samples of different lengths do not meet.
        warmup: share of the steps over which the learning rate rises from zero.
        decay: how it falls to zero afterwards: ``cosine``, ``linear``, or ``none`` to keep it.
        weight_decay: of AdamW.
        clip: the longest gradient, over all weights together; longer ones are shortened to it.
        logits: weight of the loss of the outputs: the divergence of logits from the original model's, for
            other outputs their relative squared error.
        hidden: weight of ZipLM's loss: squared distance of the hidden states, mean over tokens, sum over
            blocks.
        squarehead: weight of the SquareHead loss: the same relative to the states' size, mean over blocks.
        task: weight of the task's loss: cross entropy with ``labels`` of the training data, or of the next
            token for a decoder without them; mean squared error for float labels.
        temperature: logits are divided by it before they are compared, and their loss times its square.
        outputs: whether outputs are ``logits`` or ``features``; ``auto`` goes by the name ``logits``, or by
            integer labels.
        embeddings: train embedding tables, too.
        held_out: share of the training data that is kept from training, to measure the loss before and after.
        checkpoint_every: steps between checkpoints, from which an interrupted run goes on.
    """

    contract: ClassVar[Contract] = Contract.APPROXIMATE
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.QUANTIZED})
    uses_original: ClassVar[bool] = True

    steps: int
    learning_rate: float = 3e-4
    batch: int = 8
    warmup: float = 0.1
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    logits: float = 1.0
    hidden: float = 0.0
    squarehead: float = 1.0
    task: float = 0.0
    temperature: float = 1.0
    outputs: OutputKind = "auto"
    embeddings: bool = False
    held_out: float = 0.1
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise self._refused(name, "1 or more")
        for name in ("learning_rate", "clip", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise self._refused(name, "a positive number")
        for name in ("weight_decay", "logits", "hidden", "squarehead", "task"):
            if not 0 <= getattr(self, name) < math.inf:
                raise self._refused(name, "0 or more")
        for name in ("warmup", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                raise self._refused(name, "0 or more, and less than 1")
        if not (self.logits or self.hidden or self.squarehead or self.task):
            raise PipelineError(
                f"{self.name}: every loss has weight 0",
                hint="give logits, hidden, squarehead or task a weight",
            )

    def _refused(self, option: str, expected: str) -> PipelineError:
        return PipelineError(f"{self.name}: {option}: expected {expected}, found {getattr(self, option)}")

    def _train(
        self, model: ir.Model, ctx: PassContext, weights: list[Weight], hook: Hook | None = None
    ) -> Trained:
        if not ctx.training:
            raise MissingDataError(
                f"{self.name}: training needs data, and there is none",
                hint="give compile(..., training=inputs) or calibration=inputs",
            )
        trained = train(
            model,
            ctx.original,
            ctx.training,
            names=[weight.name for weight in weights],
            losses=self._losses(),
            training=self._training(),
            seed=int(ctx.rng.integers(2**32)),
            hook=hook,
            folder=ctx.work(model).folder,
            progress=lambda steps, description: ctx.progress(steps, f"{self.name}: {description}"),
        )
        if (self.hidden or self.squarehead) and not trained.states:
            ctx.remark("hidden states", "not compared: the model and the original have none in common")
        return trained

    def _losses(self) -> Losses:
        fields = dataclasses.fields(Losses)
        return Losses(**{field.name: getattr(self, field.name) for field in fields})

    def _training(self) -> Training:
        fields = dataclasses.fields(Training)
        return Training(**{field.name: getattr(self, field.name) for field in fields})


def reason_not_asked_for(weight: Weight, targets: Sequence[str], ignore: Sequence[str]) -> str | None:
    """Why a weight is left out, by the patterns for its module's or its own name; None if it is not."""
    names = (weight.owner, weight.name)
    if any(matches(name, ignore) for name in names):
        return "ignored"
    return None if not targets or any(matches(name, targets) for name in names) else "not a target"


def report(trained: Trained) -> str:
    """The losses before and after as one line. Not what a step took: the same run says the same."""
    text = f"held-out loss {_listed(trained.before)} before training, {_listed(trained.after)} after"
    if trained.states:
        text += f"; {len(trained.states)} hidden states compared"
    if trained.resumed_at:
        text += f"; went on from step {trained.resumed_at}"
    return text


def _listed(losses: Mapping[str, float]) -> str:
    parts = ", ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
    return f"{sum(losses.values()):.4g} ({parts})" if len(losses) > 1 else f"{sum(losses.values()):.4g}"
