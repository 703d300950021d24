"""The blocks of a model before and after the passes, side by side, equal ones folded into one row."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Mapping, Sequence

from ...ir.outline import BlockOutline, LayerOutline, ModelOutline

_LONGEST_PERIOD = 4
"""Blocks of a layer that repeat together: attention and MLP, or with cross-attention and adapters between."""


@dataclasses.dataclass(frozen=True)
class BlockPair:
    """A block before and after the passes; None where there is none."""

    before: BlockOutline | None
    after: BlockOutline | None

    @property
    def block(self) -> BlockOutline:
        """As it is now, or as it was if it is gone."""
        found = self.after or self.before
        assert found is not None
        return found


@dataclasses.dataclass(frozen=True)
class BlockRow:
    """A block, or as many as follow one another at equal distances with the same layers.

    Attributes:
        name: of the block; where there are several, with the range of the numbers in which they differ.
        pair: the first of them.
        count: how many.
    """

    name: str
    pair: BlockPair
    count: int = 1


def block_rows(
    before: ModelOutline, after: ModelOutline, kernels: Mapping[str, str]
) -> list[tuple[BlockRow, ...]]:
    """What to draw, from the input to the output: groups of rows, each of which stands for its repetitions.

    Args:
        before: the model before the passes.
        after: the model after them.
        kernels: by node of ``after``, the kernel it was bound to.
    """
    pairs = _paired(before.blocks, after.blocks)
    keys = [_key(pair, kernels) for pair in pairs]
    groups: list[tuple[BlockRow, ...]] = []
    position = 0
    while position < len(pairs):
        period, count = _repetition(keys, position)
        stop = position + period * count
        groups.append(tuple(_row(pairs[start:stop:period]) for start in range(position, position + period)))
        position = stop
    return groups


def local_name(layer: LayerOutline, block: BlockOutline) -> str:
    """The part of a layer's name that its block's name does not say."""
    return layer.name.removeprefix(f"{block.name}.")


def _paired(before: Sequence[BlockOutline], after: Sequence[BlockOutline]) -> list[BlockPair]:
    """Blocks of one name are one block; the order is that of the graph."""
    matcher = difflib.SequenceMatcher(
        a=[block.name for block in before], b=[block.name for block in after], autojunk=False
    )
    pairs: list[BlockPair] = []
    for _, start, stop, other_start, other_stop in matcher.get_opcodes():
        pairs += itertools.starmap(
            BlockPair, itertools.zip_longest(before[start:stop], after[other_start:other_stop])
        )
    return pairs


def _key(pair: BlockPair, kernels: Mapping[str, str]) -> object:
    """What makes two blocks look alike: what they do, and the layers in them."""
    return tuple(
        block
        and (
            block.kind,
            tuple(
                (local_name(layer, block), layer.shape, layer.form, kernels.get(layer.node))
                for layer in block.layers
            ),
        )
        for block in (pair.before, pair.after)
    )


def _repetition(keys: Sequence[object], start: int) -> tuple[int, int]:
    """The period at ``start`` that covers the most blocks, the shortest of those, and how often it comes."""
    best = (1, 1)
    for period in range(1, _LONGEST_PERIOD + 1):
        pattern = keys[start : start + period]
        count = 1
        while keys[start + count * period : start + (count + 1) * period] == pattern:
            count += 1
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
    return best


def _row(pairs: Sequence[BlockPair]) -> BlockRow:
    names = [pair.block.name for pair in pairs]
    return BlockRow(_ranged(names[0], names[-1]), pairs[0], len(pairs))


def _ranged(first: str, last: str) -> str:
    """``layers.0.mlp`` and ``layers.5.mlp`` → ``layers.0…5.mlp``."""
    words, others = (re.split(r"(\d+)", name) for name in (first, last))
    if len(words) != len(others):
        return first
    return "".join(
        word if word == other else f"{word}…{other}" for word, other in zip(words, others, strict=True)
    )
