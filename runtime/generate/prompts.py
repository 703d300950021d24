"""Prompts as arrays, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ...ir.errors import InputError

Tokens = npt.NDArray[np.int64]


def prompts(input_ids: Any, attention_mask: Any = None) -> tuple[Tokens, Tokens]:
    """Token ids and mask, [batch, length] int64, padded on the left.

    Args:
        input_ids: [batch, length], or a list of lists of different lengths, which are padded with 0.
        attention_mask: [batch, length], 0 for padding; all ones if absent.

    Raises:
        InputError: there is no prompt, one is empty, ids are no integers, or the shapes do not fit.
    """
    rows = isinstance(input_ids, list | tuple) and input_ids and isinstance(input_ids[0], list | tuple)
    if rows and attention_mask is None:
        return _padded([list(row) for row in input_ids])
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size:
        raise InputError(
            f"prompts: expected integers [batch, length] with at least one token, found {ids.dtype} "
            f"{list(ids.shape)}",
            hint="give token ids, one row for each prompt",
        )
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask: expected {list(ids.shape)}, found {list(mask.shape)}")
    _check(mask)
    return ids.astype(np.int64), mask.astype(np.int64)


def _padded(rows: list[list[int]]) -> tuple[Tokens, Tokens]:
    length = max(len(row) for row in rows)
    ids, mask = (np.zeros((len(rows), length), np.int64) for _ in range(2))
    for index, row in enumerate(rows):
        if not row:
            raise InputError(f"prompts: prompt {index} is empty", hint="give at least one token")
        ids[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return ids, mask


def _check(mask: npt.NDArray[Any]) -> None:
    if not mask.any(axis=1).all():
        raise InputError("attention_mask: a prompt is all padding")
    if (np.diff(mask.astype(np.int64), axis=1) < 0).any():
        raise InputError(
            "attention_mask: expected padding on the left only",
            hint="put the padding before the prompt: generation goes on at its right end",
        )
