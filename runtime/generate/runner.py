"""One session over a cache: what is bound once, and what anew for every run.

Binding takes as long as a small layer, and asking onnxruntime for its outputs the longer the more there are.
So a run of one token, of which there are many, writes to buffers that stay bound: the cache's, and one for
each other output. Only outputs whose shape is known by their run alone have one: caches that grow have not.
On a GPU such runs are launches of one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from ...ir.errors import InputError
from ..executor import Executor
from ..session import Session, first_line
from ..torch_session import TorchSession, TorchValue
from ..torch_step import TorchStep
from .cache import Cache

Tokens = npt.NDArray[np.int64]
Outputs = Mapping[str, onnxruntime.OrtValue]

_IDS = "input_ids"


class Runner:
    """Runs a decoder's session of onnxruntime on a cache.

    Args:
        session: of the bound model.
        cache: its buffers are bound; call `rebind` when they were replaced.
        batch: sequences.
    """

    def __init__(self, session: Session, cache: Cache, *, batch: int) -> None:
        self._session, self._cache = session, cache
        self.inputs = {argument.name for argument in session.inputs}
        self._shared = {slot.present: slot.past for slot in cache.slots if slot.in_place}
        self._growing = [slot.past for slot in cache.slots if not slot.in_place]
        self._others = [name for name in session.output_names if name not in self._shared]
        self._of_one_token = _buffers(session, self._others, batch)
        self._bound_to_buffers = False
        self._binding = session.io_binding()
        self.rebind()

    def rebind(self) -> None:
        """Bind shared buffers; all outputs in their order, which is that of what comes back."""
        for past in self._shared.values():
            self._binding.bind_ortvalue_input(past, self._cache.buffers[past])
        self._binding.clear_binding_outputs()
        for name in self._session.output_names:
            if name in self._shared:
                self._binding.bind_ortvalue_output(name, self._cache.buffers[self._shared[name]])
            else:
                self._binding.bind_output(name)
        self._bound_to_buffers = False

    def run(self, given: Mapping[str, Tokens]) -> Outputs:
        """Run once; inputs that the model does not have are left out.

        Returns:
            Outputs but those of the cache in place; those of one token are overwritten by the next run.

        Raises:
            InputError: onnxruntime fails.
        """
        for name in given.keys() & self.inputs:
            self._binding.bind_cpu_input(name, np.asarray(given[name], order="C"))
        for past in self._growing:
            self._binding.bind_ortvalue_input(past, self._cache.buffers[past])
        buffers = self._of_one_token if given[_IDS].shape[1] == 1 else None
        self._bind_others(buffers)
        try:
            self._session.run_with_binding(self._binding)
        except Exception as error:
            raise InputError(f"onnxruntime could not run the decoder: {first_line(error)}") from error
        if buffers is not None:
            return buffers
        return dict(zip(self._session.output_names, self._binding.get_outputs(), strict=True))

    def _bind_others(self, buffers: Outputs | None) -> None:
        if buffers is None:
            for name in self._others:
                # Bound to a device and not to memory, which would have the last run's shape.
                self._binding.bind_output(name)
        elif not self._bound_to_buffers:
            for name, buffer in buffers.items():
                self._binding.bind_ortvalue_output(name, buffer)
        self._bound_to_buffers = buffers is not None


class TorchRunner:
    """Runs a decoder of torch; one token at a time in steps, where its target has them.

    Args:
        session: of the bound model.
        cache: what is in it goes in, and what comes out is in it next.
    """

    def __init__(self, session: TorchSession, cache: Cache) -> None:
        self._session, self._cache = session, cache
        self.inputs = {argument.name for argument in session.inputs}
        self._step: TorchStep | None = None

    def rebind(self) -> None:
        """Forget the step, whose caches were replaced."""
        self._step = None

    def run(self, given: Mapping[str, Tokens]) -> Mapping[str, TorchValue]:
        """See `Runner.run`."""
        tokens = {name: array for name, array in given.items() if name in self.inputs}
        caches = {name: cast(TorchValue, value) for name, value in self._cache.buffers.items()}
        if given[_IDS].shape[1] == 1:
            self._step = self._step or self._session.step(caches, tokens)
            if self._step is not None:
                return self._session.run_step(self._step, tokens)
        return self._session.run_values({**tokens, **caches})


def runner_of(executor: Executor, cache: Cache, *, batch: int) -> Runner | TorchRunner:
    """What runs a decoder on a cache."""
    if isinstance(executor, TorchSession):
        return TorchRunner(executor, cache)
    return Runner(executor, cache, batch=batch)


def _buffers(session: Session, names: list[str], batch: int) -> Outputs | None:
    """For outputs of one token; None if there is one whose shape is not known."""
    ids = next(argument for argument in session.inputs if argument.name == _IDS)
    sizes = dict(zip(ids.shape, (batch, 1), strict=True))
    found = {}
    for output in session.outputs:
        if output.name not in names:
            continue
        known = all(isinstance(size, int) or size in sizes for size in output.shape)
        if not known or output.type != "tensor(float)":
            return None
        shape = [sizes.get(size, size) for size in output.shape]
        found[output.name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
    return found
