"""Every kind of kernel that plans choose, for common shapes: what is checked and listed ahead of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from . import decode_attention, rows, sparse_w4a16, w4a16, w8a8
from .hardware import Gpu
from .kernel import Argument, Launch
from .products import Plan
from .rows import Quantization

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
_WIDTH, _DEPTH = 4096, 4096
_ROWS = (1, 16, 32, 100, 512)
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
    found = [*_products(gpu), *_sparse_products(gpu), *_attention(gpu), *_rows()]
    return list({launch.kernel: launch for launch in found}.values())


def _products(gpu: Gpu) -> Iterator[Launch]:
    for m in _ROWS:
        for dtype in (torch.float16, torch.bfloat16):
            for group_size, shifted in ((0, False), (32, True), (128, False), (128, True)):
                plan = w4a16.plan(
                    m,
                    _WIDTH,
                    _DEPTH,
                    group_size=group_size,
                    dtype=dtype,
                    shifted=shifted,
                    bias=shifted,
                    gpu=gpu,
                )
                assert isinstance(plan, Plan)
                yield plan.product
                if plan.addition is not None:
                    yield plan.addition
        for bits, group_size in ((8, 0), (4, 0), (4, 64)):
            product = w8a8.plan(
                m,
                _WIDTH,
                _DEPTH,
                group_size=group_size,
                bits=bits,
                dtype=torch.float16,
                bias=True,
                gpu=gpu,
            )
            assert isinstance(product, Plan)
            yield product.product
            if product.addition is not None:
                yield product.addition


def _sparse_products(gpu: Gpu) -> Iterator[Launch]:
    for m in _ROWS:
        for dtype in (torch.float16, torch.bfloat16):
            for group_size, bias in ((0, False), (32, True), (128, False)):
                plan = sparse_w4a16.plan(
                    m, _WIDTH, _DEPTH, group_size=group_size, dtype=dtype, bias=bias, gpu=gpu
                )
                assert isinstance(plan, Plan)
                yield plan.product


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
