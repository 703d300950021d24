"""What runs a bound model: onnxruntime, or torch."""

from __future__ import annotations

import contextlib
import ctypes
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
    executor = TorchSession(bound, target) if isinstance(target, Torch) else Session(bound, target=target)
    _give_back_memory()
    return executor


def _give_back_memory() -> None:
    """What was freed while weights were read and packed, of which glibc keeps hundreds of MB otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL(None).malloc_trim(0)


def tensor_of(value: Value) -> torch.Tensor:
    """The memory of a value, to read and to write, as long as the value lives."""
    return value.tensor if isinstance(value, TorchValue) else as_tensor(value)
