"""Integers of a few bits in words: one after the other, low bits first, as checkpoints store them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def unpack(words: npt.NDArray[Any], bits: int, count: int) -> Bytes:
    """The first ``count`` fields of each row [R, W], where fields go on from one word into the next.

    Field i is at bit ``bits · i`` of the row. This does not depend on the width of the words, since they
    are stored low bytes first.

    Args:
        words: [R, W] integers of any width.
        bits: of a field, 1 to 8.
        count: fields of a row.

    Returns:
        [R, count].
    """
    data = np.ascontiguousarray(words, words.dtype.newbyteorder("<")).view(np.uint8)
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        fields = (data[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return fields.reshape(len(data), -1)[:, :count]
    each_bit = np.unpackbits(data, axis=1, count=count * bits, bitorder="little")
    bytes_of_fields = np.packbits(each_bit.reshape(-1, count, bits), axis=2, bitorder="little")
    return bytes_of_fields.reshape(-1, count)


def unpack_whole(words: npt.NDArray[Any], bits: int, count: int) -> Bytes:
    """The same where a field that does not fit into a word any more begins the next one."""
    width = 8 * words.dtype.itemsize
    shifts = np.arange(width // bits) * bits
    fields = (words[:, :, None] >> shifts.astype(words.dtype)) & np.array((1 << bits) - 1, words.dtype)
    whole: Bytes = fields.reshape(len(words), -1)[:, :count].astype(np.uint8)
    return whole


def add_one_to_each(words: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """Words in which 1 is added to each field, with carries from field to field, as to one number.

    Undoes the subtraction of 1 from each field of a word, whatever the fields were.
    """
    ones = sum(1 << shift for shift in range(0, 8 * words.dtype.itemsize, bits))
    unsigned = words.view(np.dtype(f"u{words.dtype.itemsize}"))
    added: npt.NDArray[Any] = unsigned + np.array(ones, unsigned.dtype)
    return added
