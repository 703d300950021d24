"""int8 activations times int8 or int4 weights: how weights are packed, which kernel runs them, its meaning.

    y[M, N] = Σ_g (Σ_{k in g} x[M, k] · w[k, N]) · x_scale[M] · scale[g, N] (+ bias[N])

The kernel (`kernels/w8a8.cu`) reads weights in slabs of 32 rows and 64 columns. Lane 4 c + t of a slab has,
of each of the columns 8 j + c, the rows 4 t … 4 t + 3 and 16 + 4 t … 16 + 4 t + 3, which are what that lane
feeds to the tensor cores: four bytes and four bytes, or the low and the high halves of four bytes. Weights of
4 bits reach them as 16 times their value; their scales are divided by 16 here. Rows of x are copied 16 bytes
at a time and those of y stored in pairs: others are padded for the kernel.

Activations of fewer bits than 8 are bytes, too: Hopper's tensor cores have no narrower integers.
"""

from __future__ import annotations

import dataclasses

import torch

from . import predict
from .hardware import Gpu
from .kernel import ELEMENTS, Argument, Kernel, Launch, Launcher, padded
from .products import Configuration, Fallback, Plan, addition, run_product, ways_to_split
from .tuning import NOTHING, Case, Table

Tensor = torch.Tensor

TILE_K, SLAB_ROWS, SLAB_COLUMNS = 128, 32, 64
_WARPS_N = 4
_STAGES = (3, 2)
"""As many as the GPU has shared memory for."""
BLOCK_COLUMNS = SLAB_COLUMNS * _WARPS_N
_TILES_M = (16, 32, 64, 128)
"""Rows of a block."""
_FEWEST_TILES = 4
"""Tiles along K that a block has at least when a product is split."""
_UNPACKING, _ADDING = 0.4, 2.0
"""Instructions that a lane has for each weight of 4 bits, and to add the sum of a group to the others."""
_SHIFTED_BY_FOUR = 16.0


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernel reads it.

    Attributes:
        weights: [K' / 32, N' / 64, chunks, 32, 4] int32.
        scales: [groups, N'] float32.
        rows, columns: K and N, not padded.
        group_size: rows that share a scale, a multiple of 32; 0 for all.
        bits: 8 or 4.
    """

    weights: Tensor
    scales: Tensor
    rows: int
    columns: int
    group_size: int
    bits: int

    @property
    def bytes(self) -> int:
        """Of memory."""
        return self.weights.nbytes + self.scales.nbytes


def pack(integers: Tensor, scales: Tensor, *, group_size: int, bits: int) -> PackedWeight:
    """Lay out a weight for the kernel.

    Args:
        integers: [K, N] int8, −128 … 127, or −8 … 7 for 4 bits.
        scales: [groups, N] float32.
        group_size: rows that share a scale, a multiple of 32; 0 for one group.
        bits: 8 or 4.

    Raises:
        ValueError: shapes or sizes that do not go together.
    """
    rows, columns = integers.shape
    groups = 1 if not group_size else -(-rows // group_size)
    if bits not in (4, 8) or group_size % SLAB_ROWS or tuple(scales.shape) != (groups, columns):
        raise ValueError(
            f"expected scales [{groups}, {columns}], found {list(scales.shape)}, "
            f"groups of {group_size}, {bits} bits"
        )
    padded_rows, padded_columns = _up(rows, TILE_K), _up(columns, BLOCK_COLUMNS)
    padded = torch.nn.functional.pad(integers, (0, padded_columns - columns, 0, padded_rows - rows))
    factor = _SHIFTED_BY_FOUR if bits == 4 else 1.0
    more_groups = 0 if not group_size else -(-padded_rows // group_size) - groups
    return PackedWeight(
        _pack_integers(padded, bits),
        torch.nn.functional.pad(scales.float() / factor, (0, padded_columns - columns, 0, more_groups)),
        rows,
        columns,
        group_size,
        bits,
    )


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _by_lanes(integers: Tensor) -> Tensor:
    """[K' / 32, N' / 64, 32 lanes, 8 tiles, 2 halves, 4 bytes] of [K', N']."""
    rows, columns = integers.shape
    # Rows: half, t, byte; columns: tile, c.
    split = integers.view(rows // SLAB_ROWS, 2, 4, 4, columns // SLAB_COLUMNS, 8, 8)
    return split.permute(0, 4, 6, 2, 5, 1, 3).flatten(2, 3)


def _pack_integers(integers: Tensor, bits: int) -> Tensor:
    lanes = _by_lanes(integers.to(torch.int16))
    if bits == 4:
        lanes = ((lanes[..., 0, :] & 15) | ((lanes[..., 1, :] & 15) << 4)).unsqueeze(-2)
    data = (lanes & 255).to(torch.uint8).flatten(3)
    # Chunks of 16 bytes, those of all lanes side by side.
    chunks = data.view(*data.shape[:3], -1, 16).transpose(2, 3).contiguous()
    return chunks.view(torch.int32)


def unpack(packed: PackedWeight) -> Tensor:
    """The integers [K, N] int8."""
    data = packed.weights.view(torch.uint8).transpose(2, 3).contiguous().view(torch.int8)
    down, across = packed.weights.shape[:2]
    if packed.bits == 8:
        lanes = data.view(down, across, 32, 8, 2, 4)
    else:
        both = data.view(down, across, 32, 8, 1, 4).to(torch.int16)
        low, high = (both << 12 >> 12), both >> 4
        lanes = torch.cat([(low + 8) % 16 - 8, high], dim=-2).to(torch.int8)
    split = lanes.view(down, across, 8, 4, 8, 2, 4).permute(0, 5, 3, 6, 1, 4, 2)
    return split.reshape(down * SLAB_ROWS, across * SLAB_COLUMNS)[: packed.rows, : packed.columns]


def reference(
    x: Tensor, x_scales: Tensor, packed: PackedWeight, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The product [M, N] by plain torch: exact sums over groups, and float64 over them, rounded once."""
    repeats = packed.group_size or packed.rows
    weight = unpack(packed).double()
    factor = _SHIFTED_BY_FOUR if packed.bits == 4 else 1.0
    product = torch.zeros(len(x), packed.columns, dtype=torch.float64, device=x.device)
    for group, start in enumerate(range(0, packed.rows, repeats)):
        part = slice(start, start + repeats)
        scales = packed.scales[group, : packed.columns].double() * factor
        product += x[:, part].double() @ weight[part] * scales
    product *= x_scales[:, None].double()
    return (product if bias is None else product + bias.double()).to(dtype)


def plan(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    bias: bool,
    gpu: Gpu,
    table: Table = NOTHING,
) -> Plan | Fallback:
    """Choose how to run one shape: as was measured to be fastest, or is predicted to be.

    Args:
        m, n, k: sizes of the product, not padded.
        group_size: rows that share a scale; 0 for all.
        bits: of weights.
        dtype: of the result.
        bias: whether there is one.
        gpu: where it runs.
        table: what was measured.
    """
    reason = _reason_not_to(m, k, group_size, bits, dtype, gpu)
    if reason:
        return Fallback(reason)
    found = candidates(m, n, k, group_size=group_size, bits=bits, dtype=dtype, bias=bias, gpu=gpu)
    case = Case("w8a8", m, n, k, str(dtype), group_size, bits)
    return table.choice(found, case, gpu) or min(
        found.values(), key=lambda plan: predicted(plan, m, n, k, group_size=group_size, bits=bits, gpu=gpu)
    )


def candidates(
    m: int, n: int, k: int, *, group_size: int, bits: int, dtype: torch.dtype, bias: bool, gpu: Gpu
) -> dict[Configuration, Plan]:
    """All that `plan` chooses from, of equal ones the first."""
    columns, tiles = -(-n // BLOCK_COLUMNS), -(-k // TILE_K)
    return {
        (tile_m, splits): _tiled(m, n, tile_m, splits, stages, group_size, bits, dtype, bias)
        for tile_m in _TILES_M
        if (stages := _stages(tile_m, group_size, bits, gpu))
        for splits in ways_to_split(columns * -(-m // tile_m), tiles, _FEWEST_TILES, gpu)
    }


def _stages(tile_m: int, group_size: int, bits: int, gpu: Gpu) -> int:
    """How many a block of so many rows has; 0: it does not fit.

    Groups need a second set of sums, for which there are no registers beside those of 64 rows.
    """
    if tile_m >= 64 and group_size:
        return 0
    fitting = (stages for stages in _STAGES if shared_bytes(tile_m, bits, stages) <= gpu.shared_bytes)
    return next(fitting, 0)


def _tiled(
    m: int,
    n: int,
    tile_m: int,
    splits: int,
    stages: int,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
    bias: bool,
) -> Plan:
    warps_m = max(1, tile_m // 64)
    kernel = Kernel(
        "w8a8",
        (
            ("ELEMENT", ELEMENTS[dtype]),
            ("WEIGHT_BITS", bits),
            ("TILE_M", tile_m),
            ("WARPS_N", _WARPS_N),
            ("WARPS_M", warps_m),
            ("WARPS_K", 1),
            ("STAGES", stages),
            ("GROUP", group_size),
            ("BIAS", int(bias and splits == 1)),
            ("SPLIT", int(splits > 1)),
        ),
    )
    grid = (-(-n // BLOCK_COLUMNS), -(-m // tile_m), splits)
    product = Launch(kernel, grid, 32 * _WARPS_N * warps_m, shared_bytes(tile_m, bits, stages))
    return Plan(product, splits, addition(m, _up(n, 2), dtype, bias=bias) if splits > 1 else None)


def weight_bytes(n: int, k: int, *, group_size: int, bits: int) -> int:
    """Of a packed weight, padded."""
    columns, rows = _up(n, BLOCK_COLUMNS), _up(k, TILE_K)
    groups = 1 if not group_size else -(-rows // group_size)
    return rows * columns * bits // 8 + groups * columns * 4


def predicted(plan: Plan, m: int, n: int, k: int, *, group_size: int, bits: int, gpu: Gpu) -> float:
    """Seconds of a plan, see `planish.codegen.cuda.predict`."""
    columns, rows, splits = plan.product.grid
    constants = dict(plan.product.kernel.constants)
    tile_m, stages = int(constants["TILE_M"]), int(constants["STAGES"])
    parts = 4.0 * m * n * splits if splits > 1 else 0.0
    weight = weight_bytes(n, k, group_size=group_size, bits=bits)
    weights_of_a_row = float(columns * BLOCK_COLUMNS * _up(k, TILE_K))
    sums = rows * tile_m * columns * BLOCK_COLUMNS * (k / group_size if group_size else 0.0)
    work = predict.Work(
        bytes=weight + m * k + (parts or 2.0 * m * n),
        cached_bytes=float(weight * rows + m * k * columns),
        operations=2.0 * rows * tile_m * weights_of_a_row,
        lane_operations=rows * weights_of_a_row * (_UNPACKING if bits == 4 else 0.0) + sums * _ADDING,
        blocks=columns * rows * splits,
        threads=plan.product.threads,
        shared_bytes=plan.product.shared_bytes,
        flying_bytes=plan.product.shared_bytes * (stages - 1) // stages,
    )
    product = predict.seconds(work, gpu.int8_rate, gpu)
    if plan.addition is None:
        return predict.launched(product)
    return predict.launched(product, predict.copied(parts + 2.0 * m * n, gpu))


def _reason_not_to(m: int, k: int, group_size: int, bits: int, dtype: torch.dtype, gpu: Gpu) -> str:
    if dtype not in ELEMENTS:
        return f"the result is {dtype}: the kernel gives float16, bfloat16 and float32"
    if gpu.capability < (8, 0):
        return f"the GPU has capability {gpu.capability[0]}.{gpu.capability[1]}: the kernel needs 8.0"
    if group_size % SLAB_ROWS:
        return f"groups of {group_size} rows: the kernel takes multiples of {SLAB_ROWS}"
    if k * 128 * 128 >= 2**31:
        return f"{k} products of int8 do not fit in 32 bits"
    if not m:
        return "no rows"
    needed = shared_bytes(_TILES_M[0], bits, _STAGES[-1])
    if needed > gpu.shared_bytes:
        return f"{needed} bytes of shared memory, and the GPU has {gpu.shared_bytes}"
    return ""


def shared_bytes(tile_m: int, bits: int, stages: int) -> int:
    """Of a block: its stages."""
    return stages * (tile_m * TILE_K + TILE_K * BLOCK_COLUMNS * bits // 8)


def run(
    plan: Plan | Fallback,
    launcher: Launcher,
    x: Tensor,
    x_scales: Tensor,
    packed: PackedWeight,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product [M, N] of x [M, K] int8, contiguous, with scales [M] float32, by the kernels of a plan.

    That of a fallback is `reference`'s.
    """
    if isinstance(plan, Fallback):
        return reference(x, x_scales, packed, bias, dtype)
    m, n, k = len(x), _up(packed.columns, 2), _up(packed.rows, 16)
    bias = None if bias is None else padded(bias, n)
    y = torch.empty(m, n, dtype=dtype, device=x.device)
    operands: list[Argument] = [padded(x, k), x_scales, packed.weights, packed.scales, bias]
    run_product(plan, launcher, operands, bias, y, k, packed.scales.shape[1])
    return y if n == packed.columns else y[:, : packed.columns].contiguous()
