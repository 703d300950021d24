"""Sequences of tensors: Python lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .registry import Integers, Lowering, as_integers, standard

Tensor = torch.Tensor


def converted(sequence: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sequence with tensors of another type."""
    return [tensor.to(dtype) for tensor in sequence]


def split_to_sequence(
    x: Tensor, sizes: Integers | None = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    """Cut along ``axis`` into parts of ``sizes``: one size for all, a list of sizes, or slices by default."""
    if sizes is None:
        return list(torch.split(x, 1, dim=axis) if keepdims else torch.unbind(x, axis))
    single = isinstance(sizes, int) or (isinstance(sizes, torch.Tensor) and sizes.ndim == 0)
    parts = as_integers(sizes)
    return list(torch.split(x, parts[0] if single else parts, dim=axis))


def sequence_at(sequence: Sequence[Tensor], position: Integers) -> Tensor:
    """One tensor of a sequence."""
    return sequence[as_integers(position)[0]]


def sequence_construct(*operands: Tensor) -> list[Tensor]:
    """A sequence of the operands."""
    return list(operands)


def sequence_empty(*, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A sequence of nothing."""
    del dtype  # of what is inserted later
    return []


def sequence_insert(
    sequence: Sequence[Tensor], tensor: Tensor, position: Integers | None = None
) -> list[Tensor]:
    """The sequence with one more tensor before ``position``, at the end by default."""
    at = len(sequence) if position is None else as_integers(position)[0]
    return [*sequence[:at], tensor, *sequence[at:]]


def sequence_erase(sequence: Sequence[Tensor], position: Integers | None = None) -> list[Tensor]:
    """The sequence without the tensor at ``position``, the last one by default."""
    at = (-1 if position is None else as_integers(position)[0]) % len(sequence)
    return [*sequence[:at], *sequence[at + 1 :]]


def sequence_length(sequence: Sequence[Tensor]) -> Tensor:
    """How many tensors there are, as an int64 scalar."""
    return torch.tensor(len(sequence), dtype=torch.int64)


def concat_from_sequence(sequence: Sequence[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """Join the tensors of a sequence along an axis, a new one if asked."""
    return torch.stack(list(sequence), dim=axis) if new_axis else torch.cat(list(sequence), dim=axis)


OPS = standard(
    {
        "ConcatFromSequence": concat_from_sequence,
        "SequenceAt": Lowering(sequence_at, integers=(1,)),
        "SequenceConstruct": sequence_construct,
        "SequenceEmpty": sequence_empty,
        "SequenceErase": Lowering(sequence_erase, integers=(1,)),
        "SequenceInsert": Lowering(sequence_insert, integers=(2,)),
        "SequenceLength": sequence_length,
        "SplitToSequence": Lowering(split_to_sequence, integers=(1,)),
    }
)
