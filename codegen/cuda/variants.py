"""Every kernel that plans choose from, for common shapes: what is checked and listed ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from . import decode_attention, rows, sparse_w4a16, w4a16, w8a8
from .hardware import Gpu
from .kernel import Argument, Launch
from .products import Configuration, Fallback, Plan
from .rows import Quantization

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
_WIDTH, _DEPTH = 4096, 4096
_FACTOR = 28
_HEADS, _TOKENS = 8, 8192


class Recorder:
    """A launcher that only notes what would be launched."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, launch: Launch, arguments: Sequence[Argument]) -> None:
        """Note it."""
        del arguments
        self.launches.append(launch)


def variants(gpu: Gpu) -> list[Launch]:
    """One launch for each."""
    found = [*_products(gpu), *_attention(gpu), *_rows()]
    return list({launch.kernel: launch for launch in found}.values())


def _products(gpu: Gpu) -> Iterator[Launch]:
    # One row has every configuration that more have.
    sizes, recorder = (1, _WIDTH, _DEPTH), Recorder()
    for dtype in (torch.float16, torch.bfloat16):
        for group_size, shifted in ((0, False), (32, True), (128, False), (128, True)):
            options: dict[str, Any] = {"group_size": group_size, "dtype": dtype, "gpu": gpu}
            yield from _launches(w4a16.candidates(*sizes, **options, shifted=shifted, bias=shifted))
            w4a16.dequantize(recorder, _packed(group_size, dtype, shifted=shifted))
        for group_size, bias in ((0, False), (32, True), (128, False)):
            options = {"group_size": group_size, "dtype": dtype, "gpu": gpu}
            yield from _launches(sparse_w4a16.candidates(*sizes, **options, bias=bias))
    for bits, group_size in ((8, 0), (4, 0), (4, 64)):
        options = {"group_size": group_size, "dtype": torch.float16, "gpu": gpu}
        yield from _launches(w8a8.candidates(*sizes, **options, bits=bits, bias=True))
    yield from recorder.launches


def _launches(candidates: Mapping[Configuration, Plan | Fallback]) -> Iterator[Launch]:
    for plan in candidates.values():
        if isinstance(plan, Plan):
            yield plan.product
            if plan.addition is not None:
                yield plan.addition


def _packed(group_size: int, dtype: torch.dtype, *, shifted: bool) -> w4a16.PackedWeight:
    scales = torch.ones(1, w4a16.BLOCK_COLUMNS, dtype=dtype)
    integers = torch.zeros(group_size or 1, w4a16.BLOCK_COLUMNS, dtype=torch.uint8)
    return w4a16.pack(integers, scales, scales if shifted else None, group_size)


def _attention(gpu: Gpu) -> Iterator[Launch]:
    for size in (64, 96, 128, 256):
        for bits in decode_attention.BITS:
            # One tile of heads, and two with all that takes registers.
            for queries, dtype, softcap in ((4, torch.float16, 0.0), (16, torch.bfloat16, 50.0)):
                plan = decode_attention.plan(
                    1,
                    _HEADS * queries,
                    _HEADS,
                    size,
                    _TOKENS,
                    bits=bits,
                    dtype=dtype,
                    scale=1.0,
                    gpu=gpu,
                    softcap=softcap,
                    bias=softcap > 0,
                )
                assert isinstance(plan, decode_attention.Plan)
                yield plan.attention
                if plan.joining is not None:
                    yield plan.joining


def _rows() -> list[Launch]:
    recorder = Recorder()
    x = torch.empty(1, _WIDTH, dtype=torch.float16)
    signs = torch.empty(_FACTOR, dtype=torch.int64)
    for quantization in (None, Quantization()):
        for kind in rows.NORMS:
            rows.normalize(recorder, x, x[0], x[0], kind=kind, epsilon=1e-5, quantization=quantization)
        rows.swiglu(recorder, x, quantization=quantization)
        rows.transform(recorder, x, None, scale=1.0, quantization=quantization)
        wide = x[:, : _FACTOR * 128].contiguous()
        rows.transform(recorder, wide, signs, scale=1.0, quantization=quantization)
    return recorder.launches
