"""What runs a bound model: onnxruntime, or torch."""

from __future__ import annotations

from typing import TypeAlias

import onnxruntime
import torch

from ..codegen.target import BoundModel, Target
from ..codegen.torch_fx.target import Torch
from .session import Session, as_tensor
from .torch_session import TorchSession, TorchValue

Executor = Session | TorchSession
Value: TypeAlias = onnxruntime.OrtValue | TorchValue
"""An array where its executor keeps it."""


def open_executor(bound: BoundModel, target: Target) -> Executor:
    """Ready to run.

    Raises:
        TargetError: onnxruntime or torch cannot run the model.
    """
    return TorchSession(bound, target) if isinstance(target, Torch) else Session(bound, target=target)


def tensor_of(value: Value) -> torch.Tensor:
    """The memory of a value, to read and to write, as long as the value lives."""
    return value.tensor if isinstance(value, TorchValue) else as_tensor(value)
