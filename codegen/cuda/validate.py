"""``python -m planish.codegen.cuda.validate``: our kernels on this machine's GPU, checked and timed.

It compares every kernel with float64, captures a product in a CUDA graph, gives one to `torch.compile`, times
kernels beside what torch would run instead and beside the roofline, with the GPU's cache flushed before each
call, and writes a table with the versions of all that took part. Nothing is written if a number is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import PlanishError, TargetError
from . import (
    decode_attention,
    predict,
    rows,
    torch_ops,  # noqa: F401 (registers the ops)
    w4a16,
    w8a8,
)
from .checks import LARGE, Sizes, agreements
from .gpu import GpuLauncher
from .hardware import Gpu
from .kernel import Launcher
from .products import Fallback, Plan
from .rows import Quantization

Tensor = torch.Tensor
Timer = Callable[[Callable[[], Any]], float]
"""Seconds of a call."""

_LEAST_WITHIN = 0.999
_REPEATS, _WARM_UP = 30, 5
_FLUSHED_BYTES = 256 << 20
"""More than any GPU's cache."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of what is timed.

    Attributes:
        weights: columns and rows.
        m: rows of activations.
        row: numbers of a row that is transformed or normalised, and how many rows.
        tokens: lengths of caches.
        heads, kv_heads, size: of attention.
    """

    weights: tuple[tuple[int, int], ...] = ((8192, 8192), (4096, 4096), (28672, 4096))
    m: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 1024, 4096)
    row: tuple[int, int] = (8192, 4096)
    tokens: tuple[int, ...] = (1024, 8192, 65536)
    heads: int = 32
    kv_heads: int = 8
    size: int = 128


@dataclasses.dataclass(frozen=True)
class Timed:
    """One kernel and what torch runs instead.

    Attributes:
        kernel, case: which, in words.
        seconds: of the kernel.
        other: of torch.
        roofline: seconds at best.
        predicted: by the planner; None where it predicts nothing.
    """

    kernel: str
    case: str
    seconds: float
    other: float
    roofline: float
    predicted: float | None = None


def timings(launcher: Launcher, gpu: Gpu, timer: Timer, shapes: Shapes, device: str) -> Iterator[Timed]:
    """All cases.

    Args:
        launcher: where kernels run.
        gpu: what plans are made for.
        timer: measures a call.
        shapes: of the cases.
        device: where tensors live.
    """
    torch.manual_seed(0)
    with torch.device(device):
        for n, k in shapes.weights:
            for m in shapes.m:
                yield from _w4a16(launcher, gpu, timer, m, n, k)
                yield from _w8a8(launcher, gpu, timer, m, n, k)
        yield from _rows(launcher, gpu, timer, *shapes.row)
        for tokens in shapes.tokens:
            yield from _attention(launcher, gpu, timer, tokens, shapes)


def _w4a16(launcher: Launcher, gpu: Gpu, timer: Timer, m: int, n: int, k: int) -> Iterator[Timed]:
    group_size = 128
    integers = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    scales = torch.rand(-(-k // group_size), n).half() * 0.01
    packed = w4a16.pack(integers, scales, None, group_size)
    dense, x = w4a16.dequantized(packed), torch.randn(m, k).half()
    options: dict[str, Any] = {"group_size": group_size, "shifted": False, "gpu": gpu}
    plan = w4a16.plan(m, n, k, **options, dtype=torch.float16, bias=False)

    def run() -> Tensor:
        if isinstance(plan, Plan):
            return w4a16.run(plan, launcher, x, packed, None)
        return x @ w4a16.dequantize(launcher, packed)

    if isinstance(plan, Plan):
        predicted = w4a16.predicted(plan, m, n, k, **options)
    else:
        predicted = w4a16.predicted_by_library(m, n, k, **options)
    moved = w4a16.weight_bytes(n, k, group_size=group_size, shifted=False) + 2 * m * (n + k)
    best = predict.roofline(moved, 2.0 * m * n * k, gpu.half_rate, gpu)
    yield Timed("w4a16", f"{m} × {n} × {k}", timer(run), timer(lambda: x @ dense), best, predicted)


def _w8a8(launcher: Launcher, gpu: Gpu, timer: Timer, m: int, n: int, k: int) -> Iterator[Timed]:
    integers = torch.randint(-127, 128, (k, n), dtype=torch.int8)
    packed = w8a8.pack(integers, torch.rand(1, n), group_size=0, bits=8)
    x, x_scales = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.rand(m)
    half, dense = x.half(), integers.half()
    options: dict[str, Any] = {"group_size": 0, "bits": 8, "gpu": gpu}
    plan = w8a8.plan(m, n, k, **options, dtype=torch.float16, bias=False)
    if isinstance(plan, Fallback):
        return
    seconds = timer(lambda: w8a8.run(plan, launcher, x, x_scales, packed, None, torch.float16))
    moved = w8a8.weight_bytes(n, k, group_size=0, bits=8) + m * k + 2 * m * n
    best = predict.roofline(moved, 2.0 * m * n * k, gpu.int8_rate, gpu)
    predicted = w8a8.predicted(plan, m, n, k, **options)
    yield Timed("w8a8", f"{m} × {n} × {k}", seconds, timer(lambda: half @ dense), best, predicted)


def _rows(launcher: Launcher, gpu: Gpu, timer: Timer, n: int, m: int) -> Iterator[Timed]:
    """Beside a copy of the same rows."""
    x, weight, quantization = torch.randn(m, n).half(), torch.randn(n).half(), Quantization()
    copy = timer(x.clone)
    case = f"{m} × {n}"
    quantized, stored = 3.0 * m * n / gpu.bandwidth, 4.0 * m * n / gpu.bandwidth
    scale = n**-0.5
    yield Timed(
        "hadamard",
        case,
        timer(lambda: rows.transform(launcher, x, None, scale=scale, quantization=None)),
        copy,
        stored,
    )
    yield Timed(
        "hadamard to int8",
        case,
        timer(lambda: rows.transform(launcher, x, None, scale=scale, quantization=quantization)),
        copy,
        quantized,
    )

    def norm() -> rows.Rows:
        return rows.normalize(launcher, x, weight, None, kind="rms", epsilon=1e-5, quantization=quantization)

    yield Timed("normalize to int8", case, timer(norm), copy, quantized)


def _attention(launcher: Launcher, gpu: Gpu, timer: Timer, tokens: int, shapes: Shapes) -> Iterator[Timed]:
    """Beside torch's attention on a cache of 16 bits."""
    heads, kv_heads, size = shapes.heads, shapes.kv_heads, shapes.size
    query = torch.randn(1, heads, size).half()
    keys, values = (torch.randn(1, kv_heads, tokens, size).half() for _ in range(2))
    lengths = torch.tensor([tokens], dtype=torch.int32)

    def by_torch() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query[:, :, None], keys, values, enable_gqa=True
        )

    other = timer(by_torch)
    for bits in decode_attention.BITS:
        plan = decode_attention.plan(
            1, heads, kv_heads, size, tokens, bits=bits, dtype=torch.float16, scale=size**-0.5, gpu=gpu
        )
        if isinstance(plan, decode_attention.Fallback):
            continue
        cache = _cache(keys, values, bits)
        seconds = timer(lambda: decode_attention.run(plan, launcher, query, cache, lengths))  # noqa: B023
        best = cache.bytes / gpu.bandwidth
        yield Timed("decode_attention", f"{bits} bits, {tokens} tokens", seconds, other, best)


def _cache(keys: Tensor, values: Tensor, bits: int) -> decode_attention.Cache:
    if bits == 16:
        return decode_attention.Cache(keys, values)
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, keys.shape, dtype=torch.int8)
    stored = decode_attention.pack_four_bits(integers) if bits == 4 else integers
    scale = torch.full((keys.shape[1], keys.shape[3]), 2.0 / half)
    return decode_attention.Cache(stored, stored.clone(), scale, scale)


def by_events(call: Callable[[], Any]) -> float:
    """Seconds on the GPU, the median of calls before each of which its cache was flushed."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(_WARM_UP):
        call()
    found: list[float] = []
    for _ in range(_REPEATS):
        flushed.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(float(start.elapsed_time(end)) / 1e3)
    return statistics.median(found)


def numbers(launcher: Launcher, gpu: Gpu, sizes: Sizes, device: str) -> list[str]:
    """A table of how close kernels come to float64.

    Raises:
        TargetError: a kernel whose numbers are wrong.
    """
    lines = ["| kernel | case | outputs | rounded | within |", "|---|---|---|---|---|"]
    for one in agreements(launcher, gpu, sizes, device):
        if one.within < _LEAST_WITHIN:
            raise TargetError(
                f"cuda: {one.kernel} ({one.case}) is wrong on {gpu.name}: {one.within:.2%} of its outputs "
                f"are within one unit in the last place of float32's sum, expected {_LEAST_WITHIN:.1%}",
                hint="please report it with this message and the versions of driver, torch and NVRTC",
            )
        lines.append(
            f"| `{one.kernel}` | {one.case} | {one.outputs:,} | {one.rounded:.2%} | {one.within:.2%} |"
        )
    return lines


def times(found: Iterator[Timed]) -> list[str]:
    """A table of timings."""
    lines = [
        "| kernel | case | µs | torch, µs | × | roofline, µs | of roofline | predicted, µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        predicted = "" if one.predicted is None else f"{one.predicted * 1e6:,.1f}"
        lines.append(
            f"| `{one.kernel}` | {one.case} | {one.seconds * 1e6:,.1f} | {one.other * 1e6:,.1f} "
            f"| {one.other / one.seconds:.2f} | {one.roofline * 1e6:,.1f} | {one.roofline / one.seconds:.0%} "
            f"| {predicted} |"
        )
        print(lines[-1], flush=True)
    return lines


def check_ops() -> None:
    """The ops of torch: a CUDA graph replays one of them on new numbers, and `torch.compile` takes it.

    Raises:
        TargetError: other numbers than those of a plain call.
    """
    packed = w4a16.pack(
        torch.randint(0, 16, (512, 512), dtype=torch.uint8), torch.rand(4, 512).half(), None, 128
    )
    operands = [tensor.cuda() for tensor in (packed.weights, packed.scales)]
    x = torch.randn(3, 512, device="cuda").half()

    def product(given: Tensor) -> Tensor:
        found: Tensor = torch.ops.planish.w4a16(given, *operands, None, None, 512, 512, 128)
        return found

    product(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = product(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    for name, found in (("a CUDA graph", captured), ("torch.compile", torch.compile(product)(x))):
        if not torch.equal(found, product(x)):
            raise TargetError(f"cuda: planish::w4a16 gives other numbers in {name}")


def report() -> str:
    """The whole table.

    Raises:
        TargetError: no GPU, or a wrong number.
    """
    if not torch.cuda.is_available():
        raise TargetError(
            "cuda: torch finds no CUDA device",
            hint="run this on a machine with a GPU and a CUDA build of torch; pip install 'planish[cuda]'",
        )
    launcher = GpuLauncher()
    checked = numbers(launcher, launcher.gpu, LARGE, "cuda")
    check_ops()
    timed = times(timings(launcher, launcher.gpu, by_events, Shapes(), "cuda"))
    lines = [
        f"# CUDA kernels on {launcher.gpu.name}",
        "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, capability {launcher.gpu.capability}, "
        f"{launcher.gpu.processors} processors. Median of {_REPEATS} calls, each with the cache flushed "
        "before it. `planish::w4a16` was checked in a CUDA graph and by torch.compile.",
        "",
        "## Times",
        "",
        *timed,
        "",
        "## Numbers",
        "",
        *checked,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Check, time and write."""
    parser = argparse.ArgumentParser(
        prog="python -m planish.codegen.cuda.validate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("cuda_validation.md"), help="where the table goes")
    arguments = parser.parse_args()
    try:
        text = report()
    except PlanishError as error:
        sys.exit(str(error))
    temporary = arguments.out.with_suffix(".partial")
    temporary.write_text(text)
    temporary.replace(arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
