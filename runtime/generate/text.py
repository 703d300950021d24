"""The texts of a batch as they were run: ids and padding, side by side."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]

_LEAST = 64


class Text:
    """Grows at its end, in amortised constant time.

    Args:
        batch: texts.
    """

    def __init__(self, batch: int) -> None:
        self._ids = np.zeros((batch, _LEAST), np.int64)
        self._mask = np.zeros((batch, _LEAST), np.int64)
        self.length = 0

    @property
    def ids(self) -> Tokens:
        """[batch, length]."""
        return self._ids[:, : self.length]

    @property
    def mask(self) -> Tokens:
        """[batch, length], 0 for padding."""
        return self._mask[:, : self.length]

    def append(self, ids: Tokens, mask: Tokens) -> None:
        """Tokens [batch, new] and their mask."""
        start, self.length = self.length, self.length + ids.shape[1]
        while self.length > self._ids.shape[1]:
            self._ids, self._mask = (
                np.pad(old, ((0, 0), (0, old.shape[1]))) for old in (self._ids, self._mask)
            )
        self._ids[:, start : self.length], self._mask[:, start : self.length] = ids, mask

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on."""
        self.length = length

    def common(self, ids: Tokens, mask: Tokens) -> int:
        """How many tokens all texts and some others [batch, any] begin with alike."""
        length = min(self.length, ids.shape[1])
        same = (self.ids[:, :length] == ids[:, :length]) & (self.mask[:, :length] == mask[:, :length])
        differs = ~same.all(axis=0)
        return int(differs.argmax()) if differs.any() else length
