"""Linears that read the same value: q, k and v of an attention; gate and up of an MLP."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from .linears import Linear, linears


@dataclasses.dataclass(frozen=True)
class SharedInput:
    """A value that several linears read, and those linears in the graph's order."""

    value: ir.Value
    linears: tuple[Linear, ...]


def shared_inputs(model: ir.Model) -> list[SharedInput]:
    """Every value that is the input of two linears or more, in the order in which they are first read."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears(model):
        readers.setdefault(linear.input, []).append(linear)
    return [SharedInput(value, tuple(group)) for value, group in readers.items() if len(group) > 1]
