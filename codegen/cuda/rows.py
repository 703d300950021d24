"""Kernels over rows: norms, the gate of a feed-forward network, Walsh-Hadamard transforms, and quantisation.

Each computes rows in float32 and either stores them in the type that came in, or quantises them on the way:

    scale[m] = max(clip · max|y[m]| / levels, smallest normal float32)
    stored[m] = round(y[m] / scale[m]), clamped to −levels − 1 … levels,  int8

which is what ``DynamicQuantizedLinear:token`` asks for with clip = 1 and levels = 127.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch

from .hardware import Gpu
from .kernel import ELEMENTS, Argument, Kernel, Launch, Launcher

Tensor = torch.Tensor
Norm = Literal["none", "rms", "layer"]

NORMS: tuple[Norm, ...] = ("none", "rms", "layer")
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_MOST_THREADS = 1024
_NUMBERS_OF_A_THREAD = 8
LARGEST_FACTOR = 60
"""Order of the matrix beside Sylvester's: a thread has a column in registers, signs in 64 bits."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How rows become int8.

    Attributes:
        levels: the largest integer: 127 for 8 bits, 7 for 4.
        clip: the share of the largest magnitude that the largest integer stands for.
    """

    levels: int = 127
    clip: float = 1.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a kernel over rows gives.

    Attributes:
        values: [M, N], of the type that came in, or int8.
        scales: [M] float32; None if they are not quantised.
    """

    values: Tensor
    scales: Tensor | None


def reason_not_to(numbers: int, dtype: torch.dtype, gpu: Gpu) -> str:
    """Why no kernel runs rows of so many numbers; empty if one does."""
    if dtype not in ELEMENTS:
        return f"activations are {dtype}: the kernels take float16, bfloat16 and float32"
    needed = _shared_bytes(numbers, _MOST_THREADS)
    if needed > gpu.shared_bytes:
        return f"a row takes {needed} bytes of shared memory, and the GPU has {gpu.shared_bytes}"
    return ""


def reason_not_to_transform(numbers: int, factor: int, dtype: torch.dtype, gpu: Gpu) -> str:
    """Why no kernel transforms rows of so many numbers by A ⊗ S, A of order ``factor``; empty if one does."""
    order, rest = divmod(numbers, factor)
    if rest or order & (order - 1):
        return f"rows of {numbers} are no power of two times {factor}"
    if factor > LARGEST_FACTOR:
        return f"a factor of order {factor}: threads multiply by at most {LARGEST_FACTOR}"
    return reason_not_to(max(numbers, 256), dtype, gpu)


def normalize(
    launcher: Launcher,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    kind: Norm,
    epsilon: float,
    quantization: Quantization | None,
) -> Rows:
    """The norm of rows x [M, N], contiguous; with ``none`` they are only quantised."""
    constants = {"NORM": NORMS.index(kind)}
    launch = _launch("normalize", x.shape[1], x.dtype, len(x), 1, quantization, constants)
    return _run(launcher, launch, x, x.shape[1], quantization, [x, weight, bias], [float(epsilon)])


def swiglu(launcher: Launcher, gate_up: Tensor, *, quantization: Quantization | None) -> Rows:
    """g · sigmoid(g) · u of rows [M, 2 N] that hold g and then u, contiguous."""
    numbers = gate_up.shape[1] // 2
    launch = _launch("swiglu", numbers, gate_up.dtype, len(gate_up), 1, quantization, {})
    return _run(launcher, launch, gate_up, numbers, quantization, [gate_up], [])


def transform(
    launcher: Launcher,
    x: Tensor,
    signs: Tensor | None,
    *,
    scale: float,
    quantization: Quantization | None,
) -> Rows:
    """scale · x · (A ⊗ S) of rows x [M, N], contiguous, A [K, K] as `packed_signs`, or 1."""
    m, numbers = x.shape
    order = 1 if signs is None else len(signs)
    rows = max(1, 256 // numbers) if numbers < 256 else 1
    while rows * numbers % 8:
        rows *= 2
    constants = {"LOG": (numbers // order).bit_length() - 1, "FACTOR": order}
    launch = _launch("hadamard", numbers, x.dtype, m, rows, quantization, constants)
    return _run(launcher, launch, x, numbers, quantization, [x, signs], [float(scale)], last=[m])


def packed_signs(factor: Tensor) -> Tensor:
    """A matrix of signs [K, K] for the kernel: [K] int64, bit i of number j set where [i, j] is −1."""
    bits = 1 << torch.arange(len(factor), device=factor.device)
    return ((factor < 0).to(torch.int64) * bits[:, None]).sum(0)


def unpacked_signs(signs: Tensor) -> Tensor:
    """The matrix of ±1 [K, K] float32 that `packed_signs` packed."""
    rows = torch.arange(len(signs), device=signs.device)
    return 1.0 - 2.0 * ((signs[None, :] >> rows[:, None]) & 1)


def _launch(
    name: str,
    numbers: int,
    dtype: torch.dtype,
    m: int,
    rows: int,
    quantization: Quantization | None,
    constants: dict[str, int],
) -> Launch:
    wanted = -(-numbers * rows // _NUMBERS_OF_A_THREAD)
    threads = min(_MOST_THREADS, -(-wanted // 32) * 32)
    kernel = Kernel(
        name,
        (
            ("ELEMENT", ELEMENTS[dtype]),
            ("ELEMENT_IS_FLOAT", int(dtype == torch.float32)),
            ("N", numbers),
            ("ROWS", rows),
            ("THREADS", threads),
            ("QUANTIZE", int(quantization is not None)),
            ("LEVELS", 127 if quantization is None else quantization.levels),
            *constants.items(),
        ),
    )
    return Launch(kernel, (-(-m // rows), 1, 1), threads, _shared_bytes(numbers * rows, threads))


def _shared_bytes(numbers: int, threads: int) -> int:
    """Rows in float32, and a number of each warp."""
    return 4 * numbers + 4 * (threads // 32)


def _run(
    launcher: Launcher,
    launch: Launch,
    x: Tensor,
    numbers: int,
    quantization: Quantization | None,
    given: list[Argument],
    settings: list[Argument],
    last: list[Argument] | None = None,
) -> Rows:
    m = len(x)
    dtype = x.dtype if quantization is None else torch.int8
    values = torch.empty(m, numbers, dtype=dtype, device=x.device)
    scales = None if quantization is None else torch.empty(m, dtype=torch.float32, device=x.device)
    clip = 1.0 if quantization is None else float(quantization.clip)
    if m:
        launcher.launch(launch, [*given, values, scales, *settings, clip, *(last or [])])
    return Rows(values, scales)


def normalize_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, kind: Norm, epsilon: float
) -> Tensor:
    """The norm in the precision of x."""
    if kind == "none":
        return x
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    found = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The gate in the precision of its argument."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def transform_reference(x: Tensor, factor: Tensor | None, *, scale: float) -> Tensor:
    """The transform in the precision of x, by a product with the whole matrix."""
    order = 1 if factor is None else len(factor)
    matrix = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    for _ in range(int(math.log2(x.shape[-1] // order))):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    if factor is not None:
        matrix = torch.kron(factor.to(x.dtype), matrix)
    return scale * (x @ matrix)


def quantize_reference(values: Tensor, quantization: Quantization) -> Rows:
    """Rows as int8, computed in float32."""
    values = values.float()
    largest = quantization.clip * values.abs().amax(-1) / quantization.levels
    scales = largest.clamp(min=_SMALLEST_NORMAL)
    limits = (-quantization.levels - 1, quantization.levels)
    return Rows(torch.round(values / scales[..., None]).clamp(*limits).to(torch.int8), scales)
