"""Our kernels as ops of torch, ``torch.ops.planish.…``: on CUDA by the kernels, on CPU by their references.

Each has a fake implementation, so that `torch.compile` and `torch.export` see shapes and types and run
nothing. None asks the device for anything but memory for its results, so that CUDA graphs can capture them.
They have no gradients: those are the target torch's.

Leading dimensions of activations are free. Where no kernel runs a call, its reference does, on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, cast

import torch

from . import decode_attention, rows, sparse_w4a16, w4a16, w8a8
from .gpu import GpuLauncher
from .products import Fallback, Plan
from .rows import Norm, Quantization, Rows
from .tuning import tuned

Tensor = torch.Tensor
_Pair = tuple[Tensor, Tensor]
_Packed = w4a16.PackedWeight | sparse_w4a16.PackedWeight | w8a8.PackedWeight

_planned_attention = functools.lru_cache(maxsize=4096)(decode_attention.plan)
_launcher_of_device = functools.cache(GpuLauncher)


def _launcher_of(tensor: Tensor) -> GpuLauncher | None:
    """What launches on a tensor's device; None on a CPU."""
    return _launcher_of_device(tensor.device.index or 0) if tensor.device.type == "cuda" else None


def _matrix(x: Tensor) -> Tensor:
    """Rows of the last axis, contiguous."""
    return x.reshape(-1, x.shape[-1]).contiguous()


# ------------------------------------------------------------------------------------------------- products


@functools.lru_cache(maxsize=4096)
def _planned(plan: Callable[..., Plan | Fallback], *sizes: int, **options: Hashable) -> Plan | Fallback:
    return plan(*sizes, **options)


def _product(
    kernel: ModuleType, x: Tensor, packed: _Packed, operands: tuple[Any, ...], **options: Hashable
) -> Tensor:
    """A product as the kernel's module runs it.

    Args:
        kernel: the module.
        x: activations.
        packed: the weight.
        operands: of the module's ``run`` and ``reference``, after the activations.
        options: of its plan, beside those that all plans have.
    """
    launcher, matrix = _launcher_of(x), _matrix(x)
    if launcher is None:
        product = kernel.reference(matrix, *operands)
    else:
        sizes, gpu = (len(matrix), packed.columns, packed.rows), launcher.gpu
        table, group_size = tuned(gpu.name), packed.group_size
        plan = _planned(kernel.plan, *sizes, group_size=group_size, gpu=gpu, table=table, **options)
        product = kernel.run(plan, launcher, matrix, *operands)
    return cast(Tensor, product).view(*x.shape[:-1], packed.columns)


def _product_fake(x: Tensor, columns: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], columns, dtype=dtype)


def _w4a16(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    shifts: Tensor | None,
    bias: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
) -> Tensor:
    packed = w4a16.PackedWeight(weights, scales, shifts, rows, columns, group_size)
    options = {"dtype": x.dtype, "shifted": shifts is not None, "bias": bias is not None}
    return _product(w4a16, x, packed, (packed, bias), **options)


def _sparse_w4a16(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
) -> Tensor:
    packed = sparse_w4a16.PackedWeight(weights, scales, rows, columns, group_size)
    return _product(sparse_w4a16, x, packed, (packed, bias), dtype=x.dtype, bias=bias is not None)


def _w8a8(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    packed = w8a8.PackedWeight(weights, scales, rows, columns, group_size, bits)
    operands = (x_scales.reshape(-1), packed, bias, dtype)
    return _product(w8a8, x, packed, operands, bits=bits, dtype=dtype, bias=bias is not None)


# ------------------------------------------------------------------------------------------------ attention


def _decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    bias: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    launcher = _launcher_of(query)
    cache = decode_attention.Cache(keys, values, key_scale, value_scale)
    lengths = lengths.to(torch.int32)
    plan = None
    if launcher is not None:
        plan = _planned_attention(
            *query.shape[:2],
            cache.kv_heads,
            cache.head_size,
            cache.capacity,
            bits=cache.bits,
            dtype=query.dtype,
            scale=scale,
            gpu=launcher.gpu,
            window=window,
            bias=bias is not None,
        )
    if launcher is None or not isinstance(plan, decode_attention.Plan):
        return decode_attention.reference(query, cache, lengths, scale=scale, window=window, bias=bias)
    bias = None if bias is None else bias.contiguous()
    return decode_attention.run(plan, launcher, query.contiguous(), cache, lengths, bias)


# ----------------------------------------------------------------------------------------------------- rows


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: str,
    epsilon: float,
    *,
    quantization: Quantization | None,
) -> Rows:
    launcher, norm = _launcher_of(x), cast(Norm, kind)
    if launcher is None or rows.reason_not_to(x.shape[-1], x.dtype, launcher.gpu):
        wide = rows.normalize_reference(_wide(x), weight, bias, kind=norm, epsilon=epsilon)
        return _finished(wide, x.dtype, quantization)
    found = rows.normalize(
        launcher, _matrix(x), weight, bias, kind=norm, epsilon=epsilon, quantization=quantization
    )
    return _shaped(found, *x.shape)


def _swiglu(gate_up: Tensor, *, quantization: Quantization | None) -> Rows:
    launcher, numbers = _launcher_of(gate_up), gate_up.shape[-1] // 2
    if launcher is None or rows.reason_not_to(numbers, gate_up.dtype, launcher.gpu):
        return _finished(rows.swiglu_reference(_wide(gate_up)), gate_up.dtype, quantization)
    found = rows.swiglu(launcher, _matrix(gate_up), quantization=quantization)
    return _shaped(found, *gate_up.shape[:-1], numbers)


def _hadamard(x: Tensor, signs: Tensor | None, scale: float, *, quantization: Quantization | None) -> Rows:
    launcher, order = _launcher_of(x), 1 if signs is None else len(signs)
    if launcher is None or rows.reason_not_to_transform(x.shape[-1], order, x.dtype, launcher.gpu):
        factor = None if signs is None else rows.unpacked_signs(signs)
        wide = rows.transform_reference(_wide(x), factor, scale=scale)
        return _finished(wide, x.dtype, quantization)
    found = rows.transform(launcher, _matrix(x), signs, scale=scale, quantization=quantization)
    return _shaped(found, *x.shape)


def _wide(x: Tensor) -> Tensor:
    """In the precision in which kernels compute; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _finished(values: Tensor, dtype: torch.dtype, quantization: Quantization | None) -> Rows:
    if quantization is None:
        return Rows(values.to(dtype), None)
    return rows.quantize_reference(values, quantization)


def _shaped(found: Rows, *shape: int) -> Rows:
    scales = None if found.scales is None else found.scales.view(shape[:-1])
    return Rows(found.values.view(shape), scales)


def _as_they_are(function: Callable[..., Rows]) -> Callable[..., Tensor]:
    """The op that stores rows in their own type."""
    return lambda *given: function(*given, quantization=None).values


def _quantizing(function: Callable[..., Rows]) -> Callable[..., _Pair]:
    """The op that stores rows as int8 and their scales as float32; its last arguments are levels and clip."""

    def quantizing(*given: Any) -> _Pair:
        *operands, levels, clip = given
        found = function(*operands, quantization=Quantization(levels, clip))
        assert found.scales is not None
        return found.values, found.scales

    return quantizing


def _same(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


def _half(gate_up: Tensor, *others: Any) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _integers(fake: Callable[..., Tensor]) -> Callable[..., _Pair]:
    def quantized(*given: Any) -> _Pair:
        like = fake(*given)
        return torch.empty_like(like, dtype=torch.int8), like.new_empty(like.shape[:-1], dtype=torch.float32)

    return quantized


_NORM = "(Tensor x, Tensor? weight, Tensor? bias, str kind, float epsilon"
_HADAMARD = "(Tensor x, Tensor? signs, float scale"
_QUANTIZED = "int levels, float clip) -> (Tensor, Tensor)"
_OPS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "w4a16": (
        "(Tensor x, Tensor weights, Tensor scales, Tensor? shifts, Tensor? bias, int rows, int columns, "
        "int group_size) -> Tensor",
        _w4a16,
        lambda x, *others: _product_fake(x, others[5]),
    ),
    "sparse_w4a16": (
        "(Tensor x, Tensor weights, Tensor scales, Tensor? bias, int rows, int columns, int group_size) "
        "-> Tensor",
        _sparse_w4a16,
        lambda x, *others: _product_fake(x, others[4]),
    ),
    "w8a8": (
        "(Tensor x, Tensor x_scales, Tensor weights, Tensor scales, Tensor? bias, int rows, int columns, "
        "int group_size, int bits, ScalarType dtype) -> Tensor",
        _w8a8,
        lambda x, *others: _product_fake(x, others[5], others[8]),
    ),
    "decode_attention": (
        "(Tensor query, Tensor keys, Tensor values, Tensor lengths, Tensor? bias, Tensor? key_scale, "
        "Tensor? value_scale, float scale, int window) -> Tensor",
        _decode_attention,
        _same,
    ),
    "normalize": (f"{_NORM}) -> Tensor", _as_they_are(_normalize), _same),
    "normalize_quantize": (f"{_NORM}, {_QUANTIZED}", _quantizing(_normalize), _integers(_same)),
    "swiglu": ("(Tensor gate_up) -> Tensor", _as_they_are(_swiglu), _half),
    "swiglu_quantize": (f"(Tensor gate_up, {_QUANTIZED}", _quantizing(_swiglu), _integers(_half)),
    "hadamard": (f"{_HADAMARD}) -> Tensor", _as_they_are(_hadamard), _same),
    "hadamard_quantize": (f"{_HADAMARD}, {_QUANTIZED}", _quantizing(_hadamard), _integers(_same)),
}
"""By name: schema, implementation, fake implementation."""
NAMES = tuple(_OPS)
"""Of the ops."""

_LIBRARY = torch.library.Library("planish", "DEF")
for _name, (_schema, _function, _fake) in _OPS.items():
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    for _key in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _key)
    torch.library.register_fake(f"planish::{_name}", _fake, lib=_LIBRARY)
