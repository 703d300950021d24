"""Recovery training: some weights of a graph, by AdamW, until it does as another graph does.

What a run gives depends on the graphs, the data, the settings and the seed, and not on whether it was
interrupted: a run that goes on from a checkpoint ends in the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir
import torch

from ...ir.errors import PassError
from ..calibration.data import Feeds
from .batches import Batches
from .checkpoint import Checkpoint, CheckpointFile, fingerprint
from .interrupt import DeferredInterrupt
from .losses import Losses
from .networks import Networks
from .schedule import Decay, learning_rate
from .trainable import float_weights

Progress = Callable[[Sequence[int], str], Iterator[int]]
Parameters = Mapping[str, torch.nn.Parameter]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How weights are trained.

    Attributes:
        steps: updates.
        learning_rate: the highest one.
        batch: samples per update, where samples can be put together.
        warmup: share of the steps over which the learning rate rises.
        decay: how it falls to zero afterwards; ``none`` keeps it.
        weight_decay: of AdamW.
        clip: the longest gradient, over all weights; longer ones are shortened.
        held_out: share of the samples that the losses before and after are measured on.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int
    learning_rate: float = 3e-4
    batch: int = 8
    warmup: float = 0.1
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    held_out: float = 0.1
    checkpoint_every: int = 100


class Hook(Protocol):
    """What is done around every update, such as keeping pruned weights at zero."""

    def before_step(self, parameters: Parameters) -> None:
        """After the gradients were computed: may change them."""

    def after_step(self, step: int, parameters: Parameters) -> None:
        """After ``step`` updates, and once with 0 before the first one: may change the weights."""

    def state(self) -> dict[str, torch.Tensor]:
        """What `restore` needs in order to go on from here."""

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from an earlier `state`."""


@dataclasses.dataclass(frozen=True)
class NoHook:
    """Does nothing."""

    def before_step(self, parameters: Parameters) -> None:
        """Leave the gradients alone."""

    def after_step(self, step: int, parameters: Parameters) -> None:
        """Leave the weights alone."""

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing to go on from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """What training gave.

    Attributes:
        parameters: the trained weights by name, for `write_back`, which takes them out.
        before: the weighted losses on the held-out batches before training, by name.
        after: the same after training.
        resumed_at: the step of the checkpoint that the run went on from; 0 if there was none.
        states: the hidden states that were compared.
    """

    parameters: dict[str, torch.nn.Parameter]
    before: Mapping[str, float]
    after: Mapping[str, float]
    resumed_at: int
    states: tuple[str, ...]

    @property
    def is_better(self) -> bool:
        """Whether training lowered the loss on the held-out batches, or left it."""
        return sum(self.after.values()) <= sum(self.before.values())


def train(
    student: ir.Model,
    teacher: ir.Model,
    data: Sequence[Feeds],
    *,
    names: Collection[str],
    losses: Losses,
    training: Training,
    seed: int,
    hook: Hook | None = None,
    folder: Path | None = None,
    progress: Progress = lambda steps, description: iter(steps),
) -> Trained:
    """Train weights of ``student`` to do as ``teacher`` does.

    Args:
        student: not changed; see `write_back`.
        teacher: not changed. Its inputs may be more than the student's: further layers' caches.
        data: batches by graph-input name of the student, with ``labels`` if there are any.
        names: the float initializers of the student to train.
        losses: what they are trained on.
        training: how.
        seed: of the order of the data.
        hook: run around every update. Its ``repr`` says what it does: checkpoints of others are not used.
        folder: where checkpoints are kept, by default nowhere. A run that was interrupted goes on from there.
        progress: iterates over steps and shows how far it is.

    Raises:
        InputError: there is no data, or it does not fit the models or the losses.
        PassError: a loss is not finite, or a checkpoint cannot be read.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written, if there is a folder.
    """
    hook = hook or NoHook()
    batches = Batches(data, student, size=training.batch, held_out=training.held_out, seed=seed)
    networks = Networks(student, teacher, names=names, losses=losses, data=data)
    if not networks.parameters:
        raise PassError("training: there is no weight to train that changes what is compared")
    file = None
    if folder is not None:
        settings = dataclasses.replace(training, checkpoint_every=0)
        key = fingerprint([student, teacher], data, sorted(names), losses, settings, seed, hook)
        file = CheckpointFile(folder, key)
    try:
        return _Run(networks, batches, training, hook, file).finish(progress)
    except _NotFiniteError as error:
        raise _explained(error, student, teacher) from error


class _NotFiniteError(Exception):
    """A loss or gradient that is no number."""


class _Run:
    """One run: the weights, their optimiser, and how far they are."""

    def __init__(
        self,
        networks: Networks,
        batches: Batches,
        training: Training,
        hook: Hook,
        file: CheckpointFile | None,
    ) -> None:
        self._networks, self._batches, self._training = networks, batches, training
        self._hook, self._file = hook, file
        self._weights = list(networks.parameters.values())
        self._optimizer = torch.optim.AdamW(
            self._weights, lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self._before: Mapping[str, float] = {}

    def finish(self, progress: Progress) -> Trained:
        """Begin, or go on, and make all updates that are left."""
        start = self._resume()
        if start is None:
            start, self._before = 0, self._held_out("before the first step")
            self._hook.after_step(0, self._networks.parameters)
        with DeferredInterrupt() as interrupt:
            for step in progress(range(start, self._training.steps), "train"):
                self._update(step)
                done = step + 1
                if interrupt.requested or done % self._training.checkpoint_every == 0:
                    self._save(done)
                if interrupt.requested:
                    raise KeyboardInterrupt
        if start < self._training.steps:
            self._save(self._training.steps)
        return Trained(
            parameters=dict(self._networks.parameters),
            before=self._before,
            after=self._held_out("after the last step"),
            resumed_at=start,
            states=self._networks.objective.states,
        )

    def _update(self, step: int) -> None:
        training = self._training
        self._optimizer.zero_grad()
        loss = sum(self._networks.losses(self._batches.at(step)).values(), torch.zeros(()))
        if not math.isfinite(loss.item()):
            raise _NotFiniteError(f"the loss is {loss.item()} at step {step}")
        loss.backward()
        self._hook.before_step(self._networks.parameters)
        length = float(torch.nn.utils.clip_grad_norm_(self._weights, training.clip))
        if not math.isfinite(length):
            raise _NotFiniteError(f"the gradient is {length} at step {step}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(
                step,
                peak=training.learning_rate,
                steps=training.steps,
                warmup=training.warmup,
                decay=training.decay,
            )
        self._optimizer.step()
        with torch.no_grad():
            self._hook.after_step(step + 1, self._networks.parameters)

    def _held_out(self, when: str) -> dict[str, float]:
        """The mean losses over the held-out samples, by name."""
        totals: dict[str, float] = {}
        count = sum(len(chunk) for chunk in self._batches.held_out)
        for chunk in self._batches.held_out:
            with torch.no_grad():
                losses = self._networks.losses(self._batches.assemble(chunk))
            for name, loss in losses.items():
                if not math.isfinite(loss.item()):
                    raise _NotFiniteError(f"the loss is {loss.item()} {when}")
                totals[name] = totals.get(name, 0.0) + loss.item() * len(chunk) / count
        return totals

    def _save(self, step: int) -> None:
        if self._file is None:
            return
        is_last = step == self._training.steps
        self._file.save(
            Checkpoint(
                step=step,
                parameters=self._networks.parameters,
                optimizer=None if is_last else self._optimizer.state_dict(),
                hook=self._hook.state(),
                before=self._before,
            )
        )

    def _resume(self) -> int | None:
        """The step of the checkpoint whose state was taken over; None if there is none."""
        checkpoint = None if self._file is None else self._file.load()
        if checkpoint is None:
            return None
        with torch.no_grad():
            for name, parameter in self._networks.parameters.items():
                parameter.copy_(checkpoint.parameters[name])
        if checkpoint.optimizer is not None:
            self._optimizer.load_state_dict(dict(checkpoint.optimizer))
        self._hook.restore(checkpoint.hook)
        self._before = checkpoint.before
        return checkpoint.step


def _explained(error: _NotFiniteError, student: ir.Model, teacher: ir.Model) -> PassError:
    """Says which weight is broken, if one is."""
    for role, model in (("teacher", teacher), ("student", student)):
        for weight in float_weights(model):
            tensor = model.graph.initializers[weight.name].const_value
            if tensor is not None and not np.isfinite(tensor.numpy()).all():
                return PassError(f"training: the {role}'s weight {weight.name!r} holds NaN or infinity")
    return PassError(f"training: {error}", hint="lower the learning rate, or clip gradients shorter")


def write_back(model: ir.Model, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Make trained weights the model's own, in the types that it has, and take them out of ``parameters``.

    Raises:
        PassError: a weight is not finite in its type.
    """
    for name in list(parameters):
        value = model.graph.initializers[name]
        before = value.const_value
        assert before is not None
        with np.errstate(over="ignore"):  # said below
            array = parameters.pop(name).detach().numpy().astype(before.dtype.numpy(), copy=False)
        if not np.isfinite(array).all():
            raise PassError(
                f"training: {name!r} is not finite as {before.dtype.name}", hint="lower the learning rate"
            )
        value.const_value = ir.Tensor(array, dtype=before.dtype, name=name)
