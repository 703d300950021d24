"""Where windows slide over [N, C, spatial…]: padding, as convolutions and pooling have it in ONNX."""

from __future__ import annotations

from collections.abc import Sequence

Pairs = list[tuple[int, int]]
"""Padding before and after, for each spatial dimension."""


def spread(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """How many elements a dilated window reaches over."""
    return [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]


def padding(
    sizes: Sequence[int], reach: Sequence[int], strides: Sequence[int], pads: Sequence[int] | None, mode: str
) -> Pairs:
    """The padding that ``auto_pad`` asks for, or ``pads``: all the starts, then all the ends."""
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-size // stride) - 1) * stride + window - size, 0)
            for size, window, stride in zip(sizes, reach, strides, strict=True)
        ]
        return [halves(total, mode) for total in totals]
    if mode == "VALID" or pads is None:
        return [(0, 0)] * len(sizes)
    return list(zip(pads[: len(sizes)], pads[len(sizes) :], strict=True))


def halves(total: int, mode: str) -> tuple[int, int]:
    """Two halves of a padding; an odd element is at the end with SAME_UPPER, at the start otherwise."""
    smaller, larger = total // 2, total - total // 2
    return (smaller, larger) if mode == "SAME_UPPER" else (larger, smaller)


def flat(pairs: Pairs) -> list[int]:
    """The padding as `torch.nn.functional.pad` takes it: last dimension first."""
    return [amount for pair in reversed(pairs) for amount in pair]
