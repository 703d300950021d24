"""4-bit weights times 16-bit activations: how weights are packed, which kernel runs a product, its meaning.

    y[M, N] = x[M, K] · w[K, N] (+ bias[N]),   w = round((q − zero_point) · scale),   y rounded from float32

The kernel (`kernels/w4a16.cu`) reads weights in slabs of 16 rows and 64 columns. A slab is 32 lanes of 16
bytes: lane 4 c + t has, in word j, of the columns 16 j + c and 16 j + 8 + c the rows 2 t, 2 t + 1, 2 t + 8
and 2 t + 9, which are what that lane feeds to the tensor cores. Scales and zero points of 64 columns are in
the order of the lanes as well: the eight columns c, 8 + c, 16 + c, … side by side.

Rows are padded to multiples of 64 and columns to those of a block, with q = 8 and a scale of 0. The kernel
copies and stores eight numbers at a time: rows of x and y of other lengths are padded for it.
"""

from __future__ import annotations

import dataclasses

import torch

from . import predict
from .hardware import Gpu
from .kernel import ELEMENTS, Argument, Kernel, Launch, Launcher, padded
from .products import LIBRARY, Configuration, Fallback, Plan, addition, run_product, ways_to_split
from .tuning import NOTHING, Case, Table

Tensor = torch.Tensor

TILE_K, SLAB_ROWS, SLAB_COLUMNS = 64, 16, 64
BLOCK_COLUMNS = 256
"""Columns of the widest block, to which weights are padded."""
GROUP_SIZES = (0, 32, 64, 128)
"""Rows that share a scale; 0: all of them."""
_MIDDLE = 8
"""The integer that a weight of 0 has without zero points."""
_WARPS_N, _WARPS_K, _STAGES = 4, 2, 4
_THREADS = 32 * _WARPS_N * _WARPS_K
_FEWEST_TILES = 8
"""Tiles along K that a block has at least when a product is split."""
_TILES_M = (16, 32, 64)
"""Rows of a block."""
_FEWEST_ROWS_OF_LIBRARY = 128
"""Below, it is not predicted: products wait for memory, of which 16-bit weights take four times as much."""
_WIDENING = 2.0
"""Instructions that a lane has for each weight: to widen pairs, and to scale and shift them."""
_AT_ONCE = 8
"""Numbers that the kernel copies and stores at a time."""
# Of the eight numbers of a word, in the order of their bits: which of the two columns, and which row of 16
# from the lane's first on. Numbers i and i + 4 are a pair of neighbouring rows.
_NUMBERS = ((0, 0), (0, 8), (1, 0), (1, 8), (0, 1), (0, 9), (1, 1), (1, 9))


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernel reads it.

    Attributes:
        weights: [K' / 16, N' / 64, 32, 4] int32.
        scales: [groups, N'] of the element type, columns in the order of the lanes.
        shifts: the same, 8 − zero point; None without zero points.
        rows, columns: K and N, not padded.
        group_size: rows that share a scale; 0 for all.
    """

    weights: Tensor
    scales: Tensor
    shifts: Tensor | None
    rows: int
    columns: int
    group_size: int

    @property
    def bytes(self) -> int:
        """Of memory."""
        tensors = [self.weights, self.scales, *([] if self.shifts is None else [self.shifts])]
        return sum(tensor.nbytes for tensor in tensors)


def pack(integers: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int) -> PackedWeight:
    """Lay out a weight for the kernel.

    Args:
        integers: [K, N] uint8, 0 … 15.
        scales: [groups, N], of the element type.
        zero_points: [groups, N] integers 0 … 15; None: all are 8.
        group_size: rows that share a scale, of `GROUP_SIZES`; 0 for one group.

    Raises:
        ValueError: shapes that do not go together.
    """
    rows, columns = integers.shape
    groups = 1 if not group_size else -(-rows // group_size)
    if group_size not in GROUP_SIZES or tuple(scales.shape) != (groups, columns):
        raise ValueError(
            f"expected scales [{groups}, {columns}], found {list(scales.shape)}, in groups of {group_size}"
        )
    padded_rows, padded_columns = _up(rows, max(TILE_K, group_size)), _up(columns, BLOCK_COLUMNS)
    more = (0, padded_columns - columns, 0, padded_rows - rows)
    padded = torch.nn.functional.pad(integers, more, value=_MIDDLE)
    padded_groups = 1 if not group_size else padded_rows // group_size
    more_scales = (0, padded_columns - columns, 0, padded_groups - groups)
    shifts = None
    if zero_points is not None:
        shifts = (_MIDDLE - zero_points.to(torch.int16)).to(scales.dtype)
        shifts = _in_order_of_lanes(torch.nn.functional.pad(shifts, more_scales))
    return PackedWeight(
        _pack_integers(padded),
        _in_order_of_lanes(torch.nn.functional.pad(scales, more_scales)),
        shifts,
        rows,
        columns,
        group_size,
    )


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _places(device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column in its slab of each number, [32 lanes, 4 words, 8 numbers]."""
    lane = torch.arange(32, device=device)[:, None, None]
    word = torch.arange(4, device=device)[None, :, None]
    second, row = torch.tensor(_NUMBERS, device=device).T[:, None, None]
    rows = 2 * (lane % 4) + row + 0 * word
    return rows, 16 * word + 8 * second + lane // 4


def _pack_integers(integers: Tensor) -> Tensor:
    rows, columns = _places(integers.device)
    slabs = integers.view(-1, SLAB_ROWS, integers.shape[1] // SLAB_COLUMNS, SLAB_COLUMNS).transpose(1, 2)
    numbers = slabs[:, :, rows, columns].to(torch.int64)
    words = (numbers << (4 * torch.arange(8, device=integers.device))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _in_order_of_lanes(scales: Tensor) -> Tensor:
    split = scales.view(len(scales), -1, 8, 8).transpose(2, 3)
    return split.reshape(scales.shape).contiguous()


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """What was packed: integers [K, N] uint8, scales and zero points (uint8, or None) [groups, N]."""
    rows, columns = _places(packed.weights.device)
    words = packed.weights.to(torch.int64) & 0xFFFFFFFF
    numbers = (words[..., None] >> (4 * torch.arange(8, device=words.device))) & 15
    down, across = packed.weights.shape[:2]
    slabs = torch.empty(down, across, SLAB_ROWS, SLAB_COLUMNS, dtype=torch.uint8, device=words.device)
    slabs[:, :, rows, columns] = numbers.to(torch.uint8)
    integers = slabs.transpose(1, 2).reshape(down * SLAB_ROWS, across * SLAB_COLUMNS)
    groups = 1 if not packed.group_size else -(-packed.rows // packed.group_size)
    scales, shifts = (
        None if tensor is None else _in_order_of_lanes(tensor)[:groups, : packed.columns]
        for tensor in (packed.scales, packed.shifts)
    )
    assert scales is not None
    zero_points = None if shifts is None else (_MIDDLE - shifts.to(torch.int16)).to(torch.uint8)
    return integers[: packed.rows, : packed.columns], scales, zero_points


def dequantized(packed: PackedWeight) -> Tensor:
    """The weight [K, N] in the type of its scales, as the kernel has it."""
    integers, scales, zero_points = unpack(packed)
    repeats = packed.group_size or packed.rows
    centred = integers.to(torch.int16) - (
        _MIDDLE if zero_points is None else _by_row(zero_points.to(torch.int16), repeats, packed.rows)
    )
    return centred.to(scales.dtype) * _by_row(scales, repeats, packed.rows)


def _by_row(groups: Tensor, repeats: int, rows: int) -> Tensor:
    return groups.repeat_interleave(repeats, dim=0)[:rows]


def reference(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The product [M, N] by plain torch, summed in float32 and rounded once."""
    product = x.float() @ dequantized(packed).float()
    return (product if bias is None else product + bias.float()).to(x.dtype)


def plan(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int,
    dtype: torch.dtype,
    shifted: bool,
    bias: bool,
    gpu: Gpu,
    table: Table = NOTHING,
) -> Plan | Fallback:
    """Choose how to run one shape: as was measured to be fastest, or is predicted to be.

    Args:
        m, n, k: sizes of the product, not padded; any.
        group_size: rows that share a scale; 0 for all.
        dtype: of activations and scales.
        shifted: whether there are zero points.
        bias: whether there is one.
        gpu: where it runs.
        table: what was measured.
    """
    reason = _reason_not_to(m, group_size, dtype, gpu)
    if reason:
        return Fallback(reason)
    found = candidates(m, n, k, group_size=group_size, dtype=dtype, shifted=shifted, bias=bias, gpu=gpu)
    case = Case("w4a16", m, n, k, str(dtype), group_size, shifted=shifted)
    measured = table.choice(found, case, gpu)
    if measured is not None:
        return measured
    if m < _FEWEST_ROWS_OF_LIBRARY:
        del found[LIBRARY]
    return min(
        found.values(),
        key=lambda plan: predicted(plan, m, n, k, group_size=group_size, shifted=shifted, gpu=gpu),
    )


def candidates(
    m: int, n: int, k: int, *, group_size: int, dtype: torch.dtype, shifted: bool, bias: bool, gpu: Gpu
) -> dict[Configuration, Plan | Fallback]:
    """All that `plan` chooses from, of equal ones the first."""
    columns, tiles = -(-n // BLOCK_COLUMNS), -(-k // TILE_K)
    found: dict[Configuration, Plan | Fallback] = {
        (tile_m, splits): _tiled(m, n, tile_m, splits, group_size, dtype, shifted, bias)
        for tile_m in _TILES_M
        if shared_bytes(tile_m, group_size, shifted) <= gpu.shared_bytes
        for splits in ways_to_split(columns * -(-m // tile_m), tiles, _FEWEST_TILES, gpu)
    }
    return {**found, LIBRARY: Fallback("dequantising first is faster", by_kernel=True)}


def _tiled(
    m: int,
    n: int,
    tile_m: int,
    splits: int,
    group_size: int,
    dtype: torch.dtype,
    shifted: bool,
    bias: bool,
) -> Plan:
    kernel = Kernel(
        "w4a16",
        (
            ("ELEMENT", ELEMENTS[dtype]),
            ("TILE_M", tile_m),
            ("WARPS_N", _WARPS_N),
            ("WARPS_K", _WARPS_K),
            ("STAGES", _STAGES),
            ("GROUP", group_size),
            ("SHIFTED", int(shifted)),
            ("BIAS", int(bias and splits == 1)),
            ("SPLIT", int(splits > 1)),
        ),
    )
    grid = (-(-n // BLOCK_COLUMNS), -(-m // tile_m), splits)
    product = Launch(kernel, grid, _THREADS, shared_bytes(tile_m, group_size, shifted))
    return Plan(product, splits, addition(m, _up(n, _AT_ONCE), dtype, bias=bias) if splits > 1 else None)


def weight_bytes(n: int, k: int, *, group_size: int, shifted: bool) -> int:
    """Of a packed weight, padded."""
    columns, rows = _up(n, BLOCK_COLUMNS), _up(k, max(TILE_K, group_size))
    groups = 1 if not group_size else rows // group_size
    return rows * columns // 2 + groups * columns * 2 * (2 if shifted else 1)


def predicted(
    plan: Plan | Fallback, m: int, n: int, k: int, *, group_size: int, shifted: bool, gpu: Gpu
) -> float:
    """Seconds of a plan, see `planish.codegen.cuda.predict`."""
    weight = weight_bytes(n, k, group_size=group_size, shifted=shifted)
    if isinstance(plan, Fallback):
        product = predict.by_library(m, n, k, 2, gpu.half_rate, gpu)
        return predict.launched(predict.copied(weight + 2.0 * n * k, gpu), product)
    columns, rows, splits = plan.product.grid
    tile_m = int(dict(plan.product.kernel.constants)["TILE_M"])
    parts = 4.0 * m * n * splits if splits > 1 else 0.0
    weights_of_a_row = float(columns * BLOCK_COLUMNS * _up(k, TILE_K))
    work = predict.Work(
        bytes=weight + 2.0 * m * k + (parts or 2.0 * m * n),
        cached_bytes=weight * rows + 2.0 * m * k * columns,
        operations=2.0 * rows * tile_m * weights_of_a_row,
        lane_operations=rows * weights_of_a_row * (_WIDENING + shifted / 2),
        blocks=columns * rows * splits,
        threads=plan.product.threads,
        shared_bytes=plan.product.shared_bytes,
        flying_bytes=plan.product.shared_bytes * (_STAGES - 1) // _STAGES,
    )
    product = predict.seconds(work, gpu.half_rate, gpu)
    if plan.addition is None:
        return predict.launched(product)
    return predict.launched(product, predict.copied(parts + 2.0 * m * n, gpu))


def _reason_not_to(m: int, group_size: int, dtype: torch.dtype, gpu: Gpu) -> str:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {dtype}: the kernel takes float16 and bfloat16"
    if gpu.capability < (8, 0):
        return f"the GPU has capability {gpu.capability[0]}.{gpu.capability[1]}: the kernel needs 8.0"
    if group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES[1:]))
        return f"groups of {group_size} rows: the kernel has {sizes}, or one for all"
    if not m:
        return "no rows"
    needed = shared_bytes(_TILES_M[0], group_size, True)
    if needed > gpu.shared_bytes:
        return f"{needed} bytes of shared memory, and the GPU has {gpu.shared_bytes}"
    return ""


def shared_bytes(tile_m: int, group_size: int, shifted: bool) -> int:
    """Of a block: the stages, in whose place the warps add up at the end."""
    groups = TILE_K // min(group_size or TILE_K, TILE_K)
    scales = groups * BLOCK_COLUMNS * 2 * (2 if shifted else 1)
    stage = tile_m * TILE_K * 2 + TILE_K * BLOCK_COLUMNS // 2 + scales
    return max(_STAGES * stage, _WARPS_N * tile_m // 16 * 32 * 32 * 4)


def run(
    plan: Plan | Fallback, launcher: Launcher, x: Tensor, packed: PackedWeight, bias: Tensor | None
) -> Tensor:
    """The product [M, N] of x [M, K], contiguous, by the kernels of a plan or by the library."""
    if isinstance(plan, Fallback):
        weight = dequantize(launcher, packed) if plan.by_kernel else dequantized(packed)
        return torch.nn.functional.linear(x, weight.T, bias)
    m, n, k = len(x), _up(packed.columns, _AT_ONCE), _up(packed.rows, _AT_ONCE)
    x = padded(x, k)
    bias = None if bias is None else padded(bias, n)
    y = x.new_empty(m, n)
    operands: list[Argument] = [x, packed.weights, packed.scales, packed.shifts, bias]
    run_product(plan, launcher, operands, bias, y, k, packed.scales.shape[1])
    return y if n == packed.columns else y[:, : packed.columns].contiguous()


def dequantize(launcher: Launcher, packed: PackedWeight) -> Tensor:
    """The weight [K, N] by a kernel, as `dequantized` has it."""
    n = _up(packed.columns, _AT_ONCE)
    kernel = Kernel(
        "dequantize",
        (
            ("ELEMENT", ELEMENTS[packed.scales.dtype]),
            ("WARPS_N", _WARPS_N),
            ("GROUP", packed.group_size),
            ("SHIFTED", int(packed.shifts is not None)),
        ),
    )
    grid = (-(-n // BLOCK_COLUMNS), -(-packed.rows // SLAB_ROWS), 1)
    shared = _WARPS_N * SLAB_ROWS * (SLAB_COLUMNS + _AT_ONCE) * 2
    weight = packed.scales.new_empty(packed.rows, n)
    operands: list[Argument] = [packed.weights, packed.scales, packed.shifts, weight]
    launcher.launch(
        Launch(kernel, grid, 32 * _WARPS_N, shared), [*operands, n, packed.rows, packed.scales.shape[1]]
    )
    return weight[:, : packed.columns]
