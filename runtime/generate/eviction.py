"""Running the eviction of a cache beside its decoder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.views.caches import LENGTHS
from ..executor import Executor, Value
from .cache import Cache

_QUERY = "query."
SEEN = "seen"
WINDOW_KEY = "planish.window"
"""Metadata of the eviction: of how many last tokens it reads queries; −1 for all since the last eviction."""
RENUMBERS_KEY = "planish.renumbers"
"""Metadata of an eviction after which positions count what is in the cache, and not the text."""

Array = npt.NDArray[np.generic]


class Eviction:
    """One sequence of evictions of one cache.

    Args:
        session: of the graph that evicts.
        model: that graph.

    Attributes:
        renumbers: positions of new tokens go on behind what is in the cache.
    """

    def __init__(self, session: Executor, model: ir.Model) -> None:
        self._session = session
        self._window = int(model.metadata_props.get(WINDOW_KEY, "0"))
        self._names = [argument.name for argument in session.inputs if argument.name.startswith(_QUERY)]
        self.renumbers = RENUMBERS_KEY in model.metadata_props
        self._queries: dict[str, Array] = {}

    def observe(self, outputs: Mapping[str, Value]) -> None:
        """Keep the queries of a run that the next eviction reads."""
        for name in self._names:
            new = outputs[name].numpy()
            old = self._queries.get(name)
            together = new if old is None else np.concatenate([old, new], axis=1)
            self._queries[name] = together if self._window < 0 else together[:, -self._window :]

    def forget(self) -> None:
        """Forget the queries: another text begins."""
        self._queries.clear()

    def run(self, cache: Cache, *, seen: int, room: int) -> None:
        """Evict tokens of a cache.

        Args:
            cache: rewritten in place.
            seen: tokens of the text so far.
            room: tokens that it is to have room for afterwards.
        """
        given = {LENGTHS: cache.lengths.copy(), SEEN: np.array(seen, np.int64), **self._queries}
        cache.replace(self._session.run_values({**given, **cache.buffers}), room=room)
        if self._window < 0:
            self.forget()
