"""How close kernels come to float64, wherever they run: one case after the other, with random numbers.

    rounded   the share of outputs that are the result of float64, rounded to their type
    within    the share of outputs between the results less and plus u, rounded;  u = 2⁻²³ · Σ |terms|

u is one unit in the last place of float32, in which kernels add, at the sum of the magnitudes of what they
add. A weight is what the kernel multiplies by, rounded to 16 bits as dequantising it would be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch

from . import decode_attention, rows, sparse_w4a16, w4a16, w8a8
from .hardware import Gpu
from .kernel import Launcher
from .products import Plan
from .rows import Quantization, Rows

Tensor = torch.Tensor

_HALF, _BFLOAT, _FLOAT = torch.float16, torch.bfloat16, torch.float32
_ULP = 2.0**-23
"""Of float32, at 1."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of one case.

    Attributes:
        kernel: its name.
        case: types and sizes, in words.
        outputs: how many numbers were compared.
        rounded, within: shares of them, see above.
    """

    kernel: str
    case: str
    outputs: int
    rounded: float
    within: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the cases.

    Attributes:
        m, n, k: of products: several m.
        row: numbers of a row, a multiple of 28 · 4.
        tokens: of a cache.
    """

    m: tuple[int, ...]
    n: int
    k: int
    row: int
    tokens: int


SMALL = Sizes(m=(1, 23, 70), n=264, k=648, row=448, tokens=203)
"""For a simulator: odd ones."""
LARGE = Sizes(m=(1, 16, 64, 200), n=4096, k=4096, row=3584, tokens=4001)
"""For a GPU."""


def agreements(launcher: Launcher, gpu: Gpu, sizes: Sizes, device: str = "cpu") -> Iterator[Agreement]:
    """All cases.

    Args:
        launcher: where kernels run.
        gpu: what plans are made for.
        sizes: of the cases.
        device: where tensors live.
    """
    torch.manual_seed(0)
    with torch.device(device):
        for m in sizes.m:
            yield from _w4a16(launcher, gpu, m, sizes)
            yield from _sparse(launcher, gpu, m, sizes)
            yield from _w8a8(launcher, gpu, m, sizes)
        yield from _rows(launcher, sizes)
        yield from _attention(launcher, gpu, sizes)


def _compared(kernel: str, case: str, found: Tensor, exact: Tensor, terms: Tensor) -> Agreement:
    low, middle, high = ((exact + sign * _ULP * terms).to(found.dtype) for sign in (-1, 0, 1))
    rounded = float((found == middle).double().mean())
    within = float(((found >= low) & (found <= high)).double().mean())
    return Agreement(kernel, case, found.numel(), rounded, within)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _w4a16(launcher: Launcher, gpu: Gpu, m: int, sizes: Sizes) -> Iterator[Agreement]:
    n, k = sizes.n, sizes.k
    for dtype, group_size, shifted in ((_HALF, 0, False), (_HALF, 128, True), (_BFLOAT, 32, True)):
        groups = 1 if not group_size else -(-k // group_size)
        integers = torch.randint(0, 16, (k, n), dtype=torch.uint8)
        scales = (torch.rand(groups, n) * 0.02 + 0.005).to(dtype)
        zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8) if shifted else None
        packed = w4a16.pack(integers, scales, zeros, group_size)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        plan = w4a16.plan(m, n, k, group_size=group_size, dtype=dtype, shifted=shifted, bias=True, gpu=gpu)
        case = f"{_name(dtype)}, group {group_size or 'all'}{', zero points' * shifted}, {m} × {n} × {k}"
        weight = w4a16.dequantized(packed)
        if isinstance(plan, Plan):
            found = w4a16.run(plan, launcher, x, packed, bias)
            yield _compared("w4a16", case, found, *_product(x, weight, bias))
        if m == sizes.m[0]:
            found = w4a16.dequantize(launcher, packed)
            yield _compared("dequantize", case, found, weight.double(), weight.double().abs())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the magnitudes of its terms."""
    added = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
    x, weight = x.double(), weight.double()
    return x @ weight + added, x.abs() @ weight.abs() + added.abs()


def _sparse(launcher: Launcher, gpu: Gpu, m: int, sizes: Sizes) -> Iterator[Agreement]:
    n, k = sizes.n, sizes.k
    for dtype, group_size in ((_HALF, 128), (_BFLOAT, 32)):
        kept = torch.rand(k // 4, 4, n).argsort(dim=1) < 2
        integers = torch.where(kept.flatten(0, 1), torch.randint(0, 16, (k, n)), 8).to(torch.uint8)
        scales = (torch.rand(-(-k // group_size), n) * 0.02 + 0.005).to(dtype)
        packed = sparse_w4a16.pack(integers, scales, group_size)
        x = torch.randn(m, k).to(dtype)
        plan = sparse_w4a16.plan(m, n, k, group_size=group_size, dtype=dtype, bias=False, gpu=gpu)
        if isinstance(plan, Plan):
            found = sparse_w4a16.run(plan, launcher, x, packed, None)
            case = f"{_name(dtype)}, group {group_size}, {m} × {n} × {k}"
            product = _product(x, sparse_w4a16.dequantized(packed))
            yield _compared("sparse_w4a16", case, found, *product)


def _w8a8(launcher: Launcher, gpu: Gpu, m: int, sizes: Sizes) -> Iterator[Agreement]:
    n, k = sizes.n, sizes.k
    for dtype, bits, group_size in ((_HALF, 8, 0), (_HALF, 4, 0), (_BFLOAT, 4, 64), (_HALF, 4, 32)):
        half = 1 << (bits - 1)
        groups = 1 if not group_size else -(-k // group_size)
        integers = torch.randint(-half, half, (k, n), dtype=torch.int8)
        packed = w8a8.pack(integers, torch.rand(groups, n) + 0.5, group_size=group_size, bits=bits)
        x, x_scales = torch.randint(-127, 128, (m, k), dtype=torch.int8), torch.rand(m) + 0.5
        plan = w8a8.plan(m, n, k, group_size=group_size, bits=bits, dtype=dtype, bias=False, gpu=gpu)
        if isinstance(plan, Plan):
            # Results of random integers would overflow 16 bits.
            x_scales = x_scales / k
            found = w8a8.run(plan, launcher, x, x_scales, packed, None, dtype)
            scales = packed.scales[:groups, :n].double() * (16 if bits == 4 else 1)
            weight = integers.double() * scales.repeat_interleave(group_size or k, dim=0)[:k]
            case = f"int{bits} weights, {_name(dtype)}, group {group_size or 'all'}, {m} × {n} × {k}"
            product = _product(x.double() * x_scales[:, None], weight)
            yield _compared("w8a8", case, found, *product)


@dataclasses.dataclass(frozen=True)
class _RowCase:
    """A kernel over rows, which takes a quantisation; its result in float64, and its terms' magnitudes."""

    run: Callable[..., Rows]
    exact: Tensor
    terms: Tensor


def _rows(launcher: Launcher, sizes: Sizes) -> Iterator[Agreement]:
    for dtype in (_HALF, _BFLOAT, _FLOAT):
        for kind, one in _row_cases(launcher, sizes.row, dtype).items():
            kernel, case = kind.split()[0], f"{_name(dtype)}, 5 × {sizes.row}"
            stored = one.run(quantization=None).values
            yield _compared(kernel, f"{kind}, {case}", stored, one.exact, one.terms)
            for quantization in (Quantization(), Quantization(levels=7, clip=0.9)):
                bits = (quantization.levels + 1).bit_length()
                yield _quantized(kernel, f"{kind} to int{bits}, {case}", one, quantization)


def _row_cases(launcher: Launcher, n: int, dtype: torch.dtype) -> dict[str, _RowCase]:
    x, gate_up = torch.randn(5, n).to(dtype), torch.randn(5, 2 * n).to(dtype)
    weight, bias = (torch.randn(n).to(dtype) for _ in range(2))
    cases = {}
    for kind in rows.NORMS:
        added = bias.double() if kind == "layer" else None
        exact = rows.normalize_reference(x.double(), weight.double(), added, kind=kind, epsilon=1e-5)
        run = functools.partial(rows.normalize, launcher, x, weight, bias, kind=kind, epsilon=1e-5)
        terms = exact.abs()
        if added is not None:
            means, stds = x.double().mean(-1, keepdim=True), x.double().std(-1, keepdim=True)
            terms = (x.double().abs() + means.abs()) / stds * weight.double().abs() + added.abs()
        cases[f"normalize {kind}"] = _RowCase(run, exact, terms)
    exact = rows.swiglu_reference(gate_up.double())
    cases["swiglu"] = _RowCase(functools.partial(rows.swiglu, launcher, gate_up), exact, exact.abs())
    signs, scale = _paley(28), n**-0.5
    cases["hadamard"] = _RowCase(
        functools.partial(rows.transform, launcher, x, rows.packed_signs(signs), scale=scale),
        rows.transform_reference(x.double(), signs, scale=scale),
        x.double().abs().sum(-1, keepdim=True) * scale,
    )
    return cases


def _quantized(kernel: str, case: str, one: _RowCase, quantization: Quantization) -> Agreement:
    """Integers, whose row's scale is as far from the exact one as its terms allow; else the row is wrong."""
    found = one.run(quantization=quantization)
    assert found.scales is not None
    scales = (quantization.clip * one.exact.abs().amax(-1) / quantization.levels)[:, None]
    share = 4 * _ULP * (one.terms.amax(-1) / one.exact.abs().amax(-1))[:, None]
    right = (found.scales[:, None].double() / scales - 1).abs() <= share
    low, middle, high = (
        ((one.exact + sign * (_ULP * one.terms + share * one.exact.abs())) / scales)
        .round()
        .clamp(-quantization.levels - 1, quantization.levels)
        for sign in (-1, 0, 1)
    )
    rounded = float(((found.values == middle) & right).double().mean())
    within = float(((found.values >= low) & (found.values <= high) & right).double().mean())
    return Agreement(kernel, case, found.values.numel(), rounded, within)


def _paley(order: int) -> Tensor:
    """A Hadamard matrix of order 2 (q + 1), q = order / 2 − 1 a prime that is 1 modulo 4 (Paley, 1933)."""
    q = order // 2 - 1
    squares = {number * number % q for number in range(1, q)}
    character = [[0 if i == j else 1 if (i - j) % q in squares else -1 for j in range(q)] for i in range(q)]
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = torch.tensor(character, dtype=torch.float64)
    eye = torch.eye(q + 1, dtype=torch.float64)
    plus, minus = (
        torch.tensor(found, dtype=torch.float64) for found in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]])
    )
    return torch.kron(conference, plus) + torch.kron(eye, minus)


def _attention(launcher: Launcher, gpu: Gpu, sizes: Sizes) -> Iterator[Agreement]:
    lengths = torch.tensor([sizes.tokens, sizes.tokens // 3 + 1], dtype=torch.int32)
    kv_heads, group, size = 2, 4, 128
    for dtype, bits in ((_HALF, 16), (_BFLOAT, 16), (_HALF, 8), (_HALF, 4), (_BFLOAT, 4)):
        shape = (2, kv_heads, sizes.tokens + 5, size)
        query = torch.randn(2, kv_heads * group, size).to(dtype)
        half = 1 << (bits - 1) if bits < 16 else 0
        cache = decode_attention.Cache(
            *(_stored(shape, bits, dtype) for _ in range(2)),
            *((torch.rand(kv_heads, size) + 0.5) * 2 / half if half else None for _ in range(2)),
        )
        plan = decode_attention.plan(
            2,
            kv_heads * group,
            kv_heads,
            size,
            sizes.tokens,
            bits=bits,
            dtype=dtype,
            scale=size**-0.5,
            gpu=gpu,
        )
        if isinstance(plan, decode_attention.Plan):
            found = decode_attention.run(plan, launcher, query, cache, lengths)
            case = f"{_name(dtype)}, {bits} bits, {kv_heads * group} heads, {sizes.tokens} tokens"
            yield _compared("decode_attention", case, found, *_attended(query, cache, lengths))


def _stored(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> Tensor:
    if bits == 16:
        return torch.randn(shape).to(dtype)
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, shape, dtype=torch.int8)
    return decode_attention.pack_four_bits(integers) if bits == 4 else integers


def _attended(query: Tensor, cache: decode_attention.Cache, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, a text at a time; and its terms, with those of the scores in the exponents."""
    found, terms = [], []
    for text, length in enumerate(lengths.tolist()):
        keys, values = (
            _wide(stored, scale)[text, :, :length]
            for stored, scale in ((cache.keys, cache.key_scale), (cache.values, cache.value_scale))
        )
        grouped = query[text].double().view(cache.kv_heads, -1, cache.head_size)
        scale = cache.head_size**-0.5
        weights = torch.softmax(grouped @ keys.mT * scale, dim=-1)
        found.append((weights @ values).flatten(0, 1))
        magnitudes = (grouped.abs() @ keys.abs().mT * scale).amax(-1, keepdim=True)
        terms.append((weights @ values.abs() * (1 + magnitudes)).flatten(0, 1))
    return torch.stack(found), torch.stack(terms)


def _wide(stored: Tensor, scale: Tensor | None) -> Tensor:
    if stored.dtype == torch.uint8:
        stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    return stored.double() * (1.0 if scale is None else scale.double()[:, None, :])
