"""One token of a decoder at a time, on buffers that stay: on a GPU a CUDA graph, which is launched at once.

A small model's kernels take less time than torch takes to launch them one by one. A graph replays all of them
on the memory that they were captured with, so inputs are copied there, and caches must stay where they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..codegen.torch_fx import INPUTS_KEY, OPS
from ..codegen.torch_fx.freeze import freeze

Tensor = torch.Tensor

_PAST_LENGTH = "past_length"
_MASK = "attention_mask"
_WARM_UP = 2
"""Calls before a capture, in which kernels are compiled and libraries take their memory."""


class TorchStep:
    """A step and the memory that it reads and writes.

    Args:
        module: as `planish.codegen.cuda.decode_step` makes it.
        caches: by name of the graph input, [batch, heads, capacity, size]; written.
        tokens: the other inputs of the first call, by name; their shapes stay, but for the mask's.
    """

    def __init__(
        self, module: fx.GraphModule, caches: Mapping[str, Tensor], tokens: Mapping[str, Tensor]
    ) -> None:
        first = next(iter(caches.values()))
        self._capacity, self._device = first.shape[2], first.device
        self._tokens = {name: self._buffer(name, value) for name, value in tokens.items()}
        self._past_length = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._write(tokens)
        names: Mapping[str, str] = module.meta[INPUTS_KEY]
        given = {**self._tokens, **caches}
        self._arguments = {names[name]: value for name, value in given.items()}
        self._arguments[_PAST_LENGTH] = self._past_length
        self._module, self._outputs = freeze(module, self._arguments, OPS)
        self._graph = self._captured() if self._device.type == "cuda" else None

    def run(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one token of each text; outputs are overwritten by the next call."""
        self._write(tokens)
        if self._graph is None:
            self._outputs = self._call()
        else:
            self._graph.replay()
        return self._outputs

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        shape = (value.shape[0], self._capacity) if name == _MASK else value.shape
        return torch.zeros(shape, dtype=value.dtype, device=self._device)

    def _write(self, tokens: Mapping[str, Tensor]) -> None:
        for name, value in tokens.items():
            self._tokens[name][:, : value.shape[1]] = value
        self._past_length.fill_(tokens[_MASK].shape[1] - 1)

    def _call(self) -> dict[str, Any]:
        with torch.no_grad():
            outputs: dict[str, Any] = self._module(**self._arguments)
        return outputs

    def _captured(self) -> torch.cuda.CUDAGraph:
        # A side stream, as torch asks for: a capture must not see work of the stream that others use.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._call()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self._call()
        return graph
