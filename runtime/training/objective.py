"""What is compared with what: the outputs and hidden states that a student and its teacher have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from ...ir.errors import InputError
from ...ir.views import blocks
from ...ir.views.values import static_dim
from ..calibration.data import LABELS, Feeds, token_mask
from .losses import (
    Losses,
    divergence,
    hidden_error,
    label_loss,
    next_token_loss,
    relative_error,
    rows,
)

Tensors = Mapping[str, torch.Tensor]

_LOGITS, _IDS = "logits", "input_ids"
_CACHES = ("present", "past")


class Objective:
    """The loss of a student.

    Hidden states are the residual stream after each block of the teacher, wherever the student has a value of
    the same name and width; blocks that were dropped from the student have none.

    Args:
        student: the model that is trained.
        teacher: what it should do as. Whether the model is a decoder is asked of it, since a student may
            have lost all attention.
        losses: which losses, with which weights.
        data: what it is trained on: its first batch says whether there are labels, and of which kind.

    Attributes:
        outputs: names of the outputs that are compared, or that the task's loss reads.
        states: names of the hidden states that are compared.

    Raises:
        InputError: a loss has nothing to work on.
    """

    def __init__(self, student: ir.Model, teacher: ir.Model, losses: Losses, data: Sequence[Feeds]) -> None:
        self._losses = losses
        self.states = _common_states(student, teacher) if losses.needs_states else ()
        self.outputs = _float_outputs(student, teacher) if losses.logits or losses.task else ()
        labels = data[0].get(LABELS)
        self._logits = _which_are_logits(self.outputs, losses, labels)
        if losses.logits and not self.outputs:
            raise InputError("training: student and teacher have no float output in common")
        if losses.needs_states and not (losses.logits or losses.task or self.states):
            raise InputError(
                "training: student and teacher have no hidden states in common",
                hint="give the loss logits or task a weight",
            )
        if losses.task:
            self._check_task(teacher, data)

    def _check_task(self, teacher: ir.Model, data: Sequence[Feeds]) -> None:
        if len(self.outputs) != 1:
            raise InputError(f"training: the task's loss needs one float output, found {list(self.outputs)}")
        labelled = [feeds for feeds in data if LABELS in feeds]
        if not labelled:
            if not _predicts_next_token(teacher, self.outputs):
                raise InputError(
                    "training: the task's loss needs labels, which the training data does not have",
                    hint="only a decoder from 'input_ids' to 'logits' is its own task",
                )
        elif len(labelled) < len(data):
            raise InputError(
                f"training: {len(data) - len(labelled)} of {len(data)} batches have no labels",
                hint="give labels with all of them, or with none",
            )
        elif any(np.array_equal(feeds[LABELS], feeds.get(_IDS, ())) for feeds in labelled):
            raise InputError(
                "training: labels repeat input_ids, and are compared with the logits of the same position",
                hint="leave labels out: a decoder is trained to predict the next token",
            )

    def __call__(self, student: Tensors, teacher: Tensors, feeds: Feeds) -> dict[str, torch.Tensor]:
        """The losses by name, times their weights; their sum is to be made small.

        Args:
            student: its outputs and hidden states by name.
            teacher: the teacher's.
            feeds: the batch, with labels if there are any.
        """
        mask = token_mask(feeds)
        real = None if mask is None else torch.from_numpy(mask)
        losses, found = self._losses, {}
        if losses.logits:
            found["logits"] = losses.logits * self._of_outputs(student, teacher, real)
        if self.states:
            pairs = [(rows(student[name], real), rows(teacher[name], real)) for name in self.states]
            if losses.hidden:
                found["hidden"] = losses.hidden * sum((hidden_error(*pair) for pair in pairs), _ZERO)
            if losses.squarehead:
                mean = sum((relative_error(*pair) for pair in pairs), _ZERO) / len(pairs)
                found["squarehead"] = losses.squarehead * mean
        if losses.task:
            found["task"] = losses.task * self._of_task(student[self.outputs[0]], feeds, real)
        return found

    def _of_outputs(self, student: Tensors, teacher: Tensors, real: torch.Tensor | None) -> torch.Tensor:
        """The mean over the outputs."""
        total = _ZERO
        for name in self.outputs:
            if student[name].shape != teacher[name].shape:
                raise InputError(
                    f"training: output {name!r} is {list(student[name].shape)}, and the original's "
                    f"{list(teacher[name].shape)}",
                    hint="passes that give an output another shape, as last-logits does, go behind this one",
                )
            pair = (rows(student[name], real), rows(teacher[name], real))
            is_logits = name in self._logits
            total = total + (
                divergence(*pair, self._losses.temperature) if is_logits else relative_error(*pair)
            )
        return total / len(self.outputs)

    def _of_task(self, output: torch.Tensor, feeds: Feeds, real: torch.Tensor | None) -> torch.Tensor:
        if LABELS in feeds:
            return label_loss(output, torch.as_tensor(np.asarray(feeds[LABELS])), real)
        return next_token_loss(output, torch.as_tensor(np.asarray(feeds[_IDS])), real)


_ZERO = torch.zeros(())


def _common_states(student: ir.Model, teacher: ir.Model) -> tuple[str, ...]:
    values = {output.name: output for node in student.graph for output in node.outputs}
    states = dict.fromkeys(block.output for block in blocks(teacher))
    return tuple(
        str(state.name) for state in states if state.name in values and _same_width(values[state.name], state)
    )


def _same_width(first: ir.Value, second: ir.Value) -> bool:
    if first.shape is None or second.shape is None or len(first.shape) != len(second.shape):
        return False
    axis = 1 if len(first.shape) == 4 else -1
    return static_dim(first, axis) == static_dim(second, axis)


def _float_outputs(student: ir.Model, teacher: ir.Model) -> tuple[str, ...]:
    """The logits if there are any; else every float output of both that is no cache."""
    theirs = {value.name for value in teacher.graph.outputs}
    names = [
        str(value.name)
        for value in student.graph.outputs
        if value.name in theirs
        and value.dtype is not None
        and value.dtype.is_floating_point()
        and not str(value.name).startswith(_CACHES)
    ]
    return (_LOGITS,) if _LOGITS in names else tuple(names)


def _which_are_logits(outputs: tuple[str, ...], losses: Losses, labels: np.ndarray | None) -> frozenset[str]:
    if losses.outputs != "auto":
        return frozenset(outputs if losses.outputs == "logits" else ())
    classifies = labels is not None and labels.dtype.kind in "biu" and len(outputs) == 1
    return frozenset(outputs if classifies else set(outputs) & {_LOGITS})


def _predicts_next_token(model: ir.Model, outputs: tuple[str, ...]) -> bool:
    inputs = {str(value.name) for value in model.graph.inputs}
    is_causal = any(name.startswith("past_key_values.") for name in inputs) or any(
        node.op_type == "Attention" and node.attributes.get_int("is_causal", 0) for node in model.graph
    )
    return is_causal and _IDS in inputs and outputs == (_LOGITS,)
