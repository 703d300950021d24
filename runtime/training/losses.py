"""What a student is trained on: distances from its teacher, and the task's own loss.

Rows are tokens, pixels or samples; padding tokens are no rows. With student s and teacher t:

    divergence     T² · mean over rows KL(softmax(t / T) ‖ softmax(s / T))       Hinton et al., 2015
    relative       Σ ‖s − t‖² / Σ ‖t‖²: of embeddings of length 1, twice the mean of 1 − cos
    hidden         Σ over states mean over rows ‖s − t‖²                         ZipLM, Kurtic et al., 2023
    squarehead     mean over states of `relative`                                Kurtic et al., 2023
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F

from ...ir.errors import InputError

Tensor = torch.Tensor
OutputKind = Literal["auto", "logits", "features"]

IGNORED_LABEL = -100
"""Integer labels of this value do not count, as in torch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
    """The weights of the losses in their sum; 0 leaves one out.

    Attributes:
        logits: of the difference between the outputs: the divergence of logits, else the relative squared
            error.
        hidden: of ZipLM's loss of hidden states.
        squarehead: of SquareHead, the relative squared error of hidden states.
        task: of the task's loss.
        temperature: T, by which logits are divided before they are compared.
        outputs: what the outputs are. ``auto`` takes an output called ``logits`` for logits, and the only
            output of a model whose labels are integers.
    """

    logits: float = 1.0
    hidden: float = 0.0
    squarehead: float = 1.0
    task: float = 0.0
    temperature: float = 1.0
    outputs: OutputKind = "auto"

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is compared with the teacher."""
        return bool(self.logits or self.needs_states)

    @property
    def needs_states(self) -> bool:
        """Whether hidden states are compared."""
        return bool(self.hidden or self.squarehead)


def rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, channels] of tokens, pixels or samples, without padding.

    Args:
        values: [batch, sequence, channels], [batch, channels, height, width], [batch, channels] or [batch].
        mask: [batch, sequence]: which tokens are real; None where all are.
    """
    if values.ndim == 4:
        values = values.movedim(1, -1)
    elif values.ndim == 3 and mask is not None and mask.shape == values.shape[:2]:
        return values[mask]
    return values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values.reshape(-1, 1)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)) in nats, mean over rows; both [rows, classes]."""
    found, expected = (torch.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    return F.kl_div(found, expected, reduction="batchmean", log_target=True) * temperature**2


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² over everything; ‖student‖² itself where the teacher is zero."""
    size = teacher.square().sum()
    error = (student - teacher).square().sum()
    return error / torch.where(size > 0, size, torch.ones_like(size))


def hidden_error(student: Tensor, teacher: Tensor) -> Tensor:
    """‖student − teacher‖², the mean over rows; both [rows, channels]."""
    return (student - teacher).square().sum(-1).mean()


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Cross entropy of each token's logits [batch, sequence, classes] with the token after it, in nats.

    ``mask`` [batch, sequence]: only pairs of real tokens count.
    """
    found, expected = logits[:, :-1], ids[:, 1:]
    if mask is None:
        return F.cross_entropy(found.flatten(0, 1), expected.flatten())
    counted = mask[:, :-1] & mask[:, 1:]
    return F.cross_entropy(found[counted], expected[counted])


def label_loss(output: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Cross entropy with integer labels, mean squared error with float ones.

    Args:
        output: [batch, classes], [batch, sequence, classes] or [batch, classes, height, width]; of float
            labels' shape, up to dimensions of size 1.
        labels: of the output's shape without the classes; `IGNORED_LABEL` does not count.
        mask: [batch, sequence]: labels of padding do not count.

    Raises:
        InputError: the shapes do not fit each other, or a label is no class.
    """
    if labels.dtype.is_floating_point:
        if output.squeeze().shape != labels.squeeze().shape:
            raise _misfit(output, labels)
        return F.mse_loss(output.reshape(labels.shape), labels.to(output.dtype))
    channels = 1 if output.ndim == 4 else -1
    logits = output.movedim(channels, -1)
    if labels.shape != logits.shape[:-1]:
        raise _misfit(output, labels)
    labels = labels.long()
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(~mask, IGNORED_LABEL)
    counted = labels[labels != IGNORED_LABEL]
    if len(counted) and (counted.min() < 0 or counted.max() >= logits.shape[-1]):
        raise InputError(
            f"labels: expected classes from 0 to {logits.shape[-1] - 1}, "
            f"found {int(counted.min())} to {int(counted.max())}"
        )
    total = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return total / max(len(counted), 1)


def _misfit(output: Tensor, labels: Tensor) -> InputError:
    kind = "float" if labels.dtype.is_floating_point else "integer"
    return InputError(
        f"labels: {kind} labels of shape {list(labels.shape)} do not fit the output's {list(output.shape)}",
        hint="integer labels are classes, [batch] or [batch, sequence]; float labels have the output's shape",
    )
