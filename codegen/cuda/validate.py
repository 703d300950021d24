"""``python -m planish.codegen.cuda.validate``: our kernels on this machine's GPU, checked and timed.

It compares every kernel with float64, captures a product in a CUDA graph, gives one to `torch.compile`, times
kernels beside what torch would run instead and beside the roofline, with the GPU's cache flushed before each
call, and writes a table with the versions of all that took part. Nothing is written if a number is wrong.

With ``--tune`` it first times all plans that layers of the given shapes could have. The fastest ones become
this GPU's in planish's cache folder, and are used from then on (see `planish.codegen.cuda.tuning`).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
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
)
from .checks import LARGE, Sizes, agreements
from .gpu import GpuLauncher
from .hardware import Gpu
from .kernel import Launcher
from .layers import TIMED, Layer, Timer, fastest
from .products import Fallback
from .rows import Quantization
from .tuning import Table, add, tuned

Tensor = torch.Tensor

_LEAST_WITHIN = 0.999
_REPEATS, _WARM_UP = 30, 5
_FLUSHED_BYTES = 256 << 20
"""More than any GPU's cache."""
_RATES: Mapping[str, Callable[[Gpu], float]] = {
    "w4a16": lambda gpu: gpu.half_rate,
    "sparse_w4a16": lambda gpu: 2 * gpu.half_rate,
    "w8a8": lambda gpu: gpu.int8_rate,
}
"""Of products, at best."""


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
        plan: whether the times that it was chosen by were measured or predicted; empty where none were.
    """

    kernel: str
    case: str
    seconds: float
    other: float
    roofline: float
    predicted: float | None = None
    plan: str = ""


def timings(
    launcher: Launcher, gpu: Gpu, timer: Timer, shapes: Shapes, table: Table, device: str
) -> Iterator[Timed]:
    """All cases.

    Args:
        launcher: where kernels run.
        gpu: what plans are made for.
        timer: measures a call.
        shapes: of the cases.
        table: what plans of products are chosen by.
        device: where tensors live.
    """
    torch.manual_seed(0)
    with torch.device(device):
        for n, k in shapes.weights:
            for make in TIMED:
                layer = make(n, k)
                for m in shapes.m:
                    yield from _product(launcher, gpu, timer, layer, m, table)
        yield from _rows(launcher, gpu, timer, *shapes.row)
        for tokens in shapes.tokens:
            yield from _attention(launcher, gpu, timer, tokens, shapes)


def _product(
    launcher: Launcher, gpu: Gpu, timer: Timer, layer: Layer, m: int, table: Table
) -> Iterator[Timed]:
    """Beside torch's product with 16 bits."""
    n, k, kernel = layer.n, layer.k, layer.kernel
    plan = layer.plan(m, gpu, table)
    if isinstance(plan, Fallback) and not plan.by_kernel:
        return
    operands, x, dense = layer.operands(m), torch.randn(m, k).half(), torch.randn(k, n).half()
    moved = kernel.weight_bytes(n, k, **layer.options) + operands[0].nbytes + 2 * m * n
    yield Timed(
        layer.name,
        f"{m} × {n} × {k}",
        timer(functools.partial(layer.run, plan, launcher, operands)),
        timer(lambda: x @ dense),
        predict.roofline(moved, 2.0 * m * n * k, _RATES[layer.name](gpu), gpu),
        kernel.predicted(plan, m, n, k, **layer.options, gpu=gpu),
        "predicted" if table.fastest(layer.case(m), gpu) is None else "measured",
    )


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
        "| kernel | case | µs | torch, µs | × | roofline, µs | of roofline | predicted, µs | plan |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        predicted = "" if one.predicted is None else f"{one.predicted * 1e6:,.1f}"
        lines.append(
            f"| `{one.kernel}` | {one.case} | {one.seconds * 1e6:,.1f} | {one.other * 1e6:,.1f} "
            f"| {one.other / one.seconds:.2f} | {one.roofline * 1e6:,.1f} | {one.roofline / one.seconds:.0%} "
            f"| {predicted} | {one.plan} |"
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


def tune(launcher: Launcher, gpu: Gpu, timer: Timer, shapes: Shapes, device: str) -> None:
    """Measure plans of layers, and write them into the GPU's table.

    Raises:
        TargetError: the table cannot be written.
    """
    found = {}
    for case, configuration in fastest(launcher, gpu, timer, shapes.weights, device):
        print(f"{case}: {configuration}", flush=True)
        found[case] = configuration
    print(f"written to {add(gpu.name, found)}")


def report(shapes: Shapes, *, tuning: bool) -> str:
    """The whole table.

    Args:
        shapes: of what is timed.
        tuning: whether plans are measured before.

    Raises:
        TargetError: no GPU, a wrong number, or a tuning table that cannot be written.
    """
    if not torch.cuda.is_available():
        raise TargetError(
            "cuda: torch finds no CUDA device",
            hint="run this on a machine with a GPU and a CUDA build of torch; pip install 'planish[cuda]'",
        )
    launcher = GpuLauncher()
    checked = numbers(launcher, launcher.gpu, LARGE, "cuda")
    check_ops()
    if tuning:
        tune(launcher, launcher.gpu, by_events, shapes, "cuda")
    table = tuned(launcher.gpu.name)
    timed = times(timings(launcher, launcher.gpu, by_events, shapes, table, "cuda"))
    lines = [
        f"# CUDA kernels on {launcher.gpu.name}",
        "",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, capability {launcher.gpu.capability}, "
        f"{launcher.gpu.processors} processors. Median of {_REPEATS} calls, each with the cache flushed "
        "before it. Plans were chosen by times that `--tune` measured, or by predicted ones. "
        "`planish::w4a16` was checked in a CUDA graph and by torch.compile.",
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


def _weights(text: str) -> tuple[tuple[int, int], ...]:
    """Columns and rows of weights, of which 8192x8192,28672x4096 are two."""
    one = r"[1-9]\d*x[1-9]\d*"
    if not re.fullmatch(f"{one}(,{one})*", text):
        raise argparse.ArgumentTypeError(f"expected columns x rows, as 8192x8192,28672x4096, found {text!r}")
    shapes = (part.split("x") for part in text.split(","))
    return tuple((int(columns), int(rows)) for columns, rows in shapes)


def main() -> None:
    """Check, time and write."""
    parser = argparse.ArgumentParser(
        prog="python -m planish.codegen.cuda.validate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("cuda_validation.md"), help="where the table goes")
    parser.add_argument("--tune", action="store_true", help="measure plans, and use the fastest from now on")
    parser.add_argument(
        "--shapes",
        type=_weights,
        default=Shapes.weights,
        help="columns and rows of weights, as 8192x8192,28672x4096",
    )
    arguments = parser.parse_args()
    try:
        text = report(Shapes(weights=arguments.shapes), tuning=arguments.tune)
    except PlanishError as error:
        sys.exit(str(error))
    temporary = arguments.out.with_suffix(".partial")
    temporary.write_text(text)
    temporary.replace(arguments.out)
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
