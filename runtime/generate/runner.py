"""One session over a cache: what is bound once, and what anew for every run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnxruntime

from ...ir.errors import InputError
from ..session import Session, first_line
from .cache import Cache

Tokens = npt.NDArray[np.int64]
Outputs = dict[str, onnxruntime.OrtValue]


class Runner:
    """Runs a decoder's session on a cache.

    Args:
        session: of the bound model.
        cache: its buffers are bound; call `rebind` when they were replaced.
    """

    def __init__(self, session: Session, cache: Cache) -> None:
        self._session, self._cache = session, cache
        self.inputs = {argument.name for argument in session.inputs}
        self._binding = session.io_binding()
        self.rebind()

    def rebind(self) -> None:
        """Bind shared buffers; all outputs in their order, which is that of what comes back."""
        shared = {slot.present: slot.past for slot in self._cache.slots if slot.in_place}
        for past in shared.values():
            self._binding.bind_ortvalue_input(past, self._cache.buffers[past])
        for name in self._session.output_names:
            if name in shared:
                self._binding.bind_ortvalue_output(name, self._cache.buffers[shared[name]])
            else:
                self._binding.bind_output(name)

    def run(self, given: Mapping[str, Tokens]) -> Outputs:
        """Run once; inputs that the model does not have are left out.

        Raises:
            InputError: onnxruntime fails.
        """
        for name in given.keys() & self.inputs:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
        in_place = {slot.present for slot in self._cache.slots if slot.in_place}
        for slot in self._cache.slots:
            if not slot.in_place:
                self._binding.bind_ortvalue_input(slot.past, self._cache.buffers[slot.past])
        for name in self._session.output_names:
            if name not in in_place:
                # Bound to a device and not to memory, which would have the last run's shape.
                self._binding.bind_output(name)
        try:
            self._session.run_with_binding(self._binding)
        except Exception as error:
            raise InputError(f"onnxruntime could not run the decoder: {first_line(error)}") from error
        return dict(zip(self._session.output_names, self._binding.get_outputs(), strict=True))
