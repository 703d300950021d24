"""What says how one ONNX op becomes one call of a Python function on torch tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

OpKey = tuple[str, str]
"""(domain, op type); the standard domain is the empty string."""


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How one op is lowered: ``function(*inputs, **attributes)``.

    The function must be importable by its name, so that the lowered module can be printed, copied and saved.
    Omitted inputs are None, and attributes that the node does not set are left out: the function's defaults
    are those of the op.

    Attributes:
        function: tensors and attributes in, a tensor out. Attributes that name an element type arrive as a
            `torch.dtype`; a tensor attribute of one element arrives as a number and, as ``dtype``, its type.
        integers: positions of inputs that say something about shapes. They arrive as a Python number or a
            list of them where they are constant, as a tensor otherwise; see `as_integers`.
        several: the function returns a tuple, one item for each output.
        exact: positions of inputs whose constants keep their element type, whatever the module computes in.
        creates: the function makes a tensor out of numbers alone and takes the ``device`` to put it on. Only
            int64 arrives as numbers then, so that their type is known.
        like: position of the input whose element type the result has.
        only: attributes of which one value alone is lowered.
    """

    function: Callable[..., Any]
    integers: tuple[int, ...] = ()
    exact: tuple[int, ...] = ()
    several: bool = False
    creates: bool = False
    like: int | None = None
    only: Mapping[str, int | str] = dataclasses.field(default_factory=dict)


_LONGEST_LIST = 64
"""Numbers of the longest operand that is written into the graph."""
Registry = Mapping[OpKey, Lowering]
Integers = torch.Tensor | Sequence[int] | int
"""An operand that was declared in `Lowering.integers`."""


def as_integers(operand: Integers) -> list[int]:
    """The integers of a shape operand: [n] or a single one."""
    if isinstance(operand, torch.Tensor):
        return [int(item) for item in operand.reshape(-1).tolist()]
    return [int(item) for item in operand] if isinstance(operand, Sequence) else [int(operand)]


def is_list(shape: Sequence[int]) -> bool:
    """Whether a constant operand that says something about shapes is written into the graph as numbers."""
    size = math.prod(shape)
    # A list of no lists has lost its second dimension.
    return size <= _LONGEST_LIST and (len(shape) <= 1 or size > 0)


def standard(table: Mapping[str, Callable[..., Any] | Lowering]) -> dict[OpKey, Lowering]:
    """A registry of ops of the standard domain from op types; a bare function is a plain `Lowering`."""
    return {
        ("", op_type): entry if isinstance(entry, Lowering) else Lowering(entry)
        for op_type, entry in table.items()
    }
