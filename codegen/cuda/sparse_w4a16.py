"""2:4-sparse 4-bit weights times 16-bit activations: how weights are packed, which kernel runs a product.

    y[M, N] = x[M, K] · w[K, N] (+ bias[N]),   w = round((q − 8) · scale),   y rounded from float32

Of every four neighbouring rows of a column of w, from a multiple of four on, at most two are not zero, that
is, have another q than 8. Two of them are kept, with their places in the four; the rest costs no memory and
no multiplication.

The kernel (`kernels/sparse_w4a16.cu`) reads weights in slabs of 64 rows and 64 columns: for each of the two
steps of 32 rows 32 lanes of 16 bytes of kept numbers, then 32 lanes of 16 bytes of places. Lane 4 c + t has,
in word j of a step, the columns 8 c + 2 j and 8 c + 2 j + 1 of the fours of rows t and t + 4. In word
2 step + i of the places it has those of the columns 8 c + 2 j and 8 c + 2 j + 1, j = 2 i + t // 2, of the
fours 4 (t % 2) … 4 (t % 2) + 3: which lanes of four have them for an instruction is that one's selector.

Rows are padded to multiples of 128 and columns to those of a block, with q = 8 and a scale of 0. The kernel
copies and stores eight numbers at a time: rows of x and y of other lengths are padded for it.
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

TILE_K, SLAB_ROWS, SLAB_COLUMNS = 128, 64, 64
BLOCK_COLUMNS = 256
"""Columns of a block, to which weights are padded."""
GROUP_SIZES = (0, 32, 64, 128)
"""Rows that share a scale; 0: all of them."""
_ZERO = 8
"""The integer that a weight of 0 has."""
_FOUR, _KEPT = 4, 2
_WARPS_N, _WARPS_K = 4, 2
_THREADS = 32 * _WARPS_N * _WARPS_K
_STAGES = {8: 4, 16: 4, 32: 4, 64: 3}
"""By the rows of x of a block: as many as fit beside each other on a GPU with 99 KB of shared memory."""
_FEWEST_TILES = 4
"""Tiles along K that a block has at least when a product is split."""
_MOST_BLOCKS = 65535
"""Along an axis of a grid that is not its first."""
_WIDENING = 2.0
"""Instructions that a lane has for each weight that is kept: to widen pairs, and to scale them."""
_AT_ONCE = 8
"""Numbers that the kernel copies and stores at a time."""


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight as the kernel reads it.

    Attributes:
        weights: [K' / 64, N' / 64, 3, 32, 4] int32: kept numbers of two steps, and their places.
        scales: [groups, N'] of the element type.
        rows, columns: K and N, not padded.
        group_size: rows that share a scale; 0 for all.
    """

    weights: Tensor
    scales: Tensor
    rows: int
    columns: int
    group_size: int

    @property
    def bytes(self) -> int:
        """Of memory."""
        return self.weights.nbytes + self.scales.nbytes


def pack(integers: Tensor, scales: Tensor, group_size: int) -> PackedWeight:
    """Lay out a weight for the kernel.

    Args:
        integers: [K, N] uint8, 0 … 15, of which 8 is zero.
        scales: [groups, N], of the element type.
        group_size: rows that share a scale, of `GROUP_SIZES`; 0 for one group.

    Raises:
        ValueError: shapes that do not go together, other integers, or a weight that is not 2:4-sparse.
    """
    rows, columns = integers.shape
    groups = _groups(rows, group_size)
    if group_size not in GROUP_SIZES or tuple(scales.shape) != (groups, columns):
        raise ValueError(
            f"expected scales [{groups}, {columns}], found {list(scales.shape)}, in groups of {group_size}"
        )
    if integers.dtype != torch.uint8 or int(integers.max()) > 15:
        raise ValueError(
            f"expected integers of 4 bits in uint8, found {integers.dtype} up to {integers.max()}"
        )
    padded_rows, padded_columns = _up(rows, TILE_K), _up(columns, BLOCK_COLUMNS)
    more = (0, padded_columns - columns, 0, padded_rows - rows)
    numbers, places = _kept(torch.nn.functional.pad(integers, more, value=_ZERO))
    more_scales = (0, padded_columns - columns, 0, _groups(padded_rows, group_size) - groups)
    return PackedWeight(
        torch.cat([_pack_numbers(numbers), _pack_places(places)], dim=2),
        torch.nn.functional.pad(scales, more_scales),
        rows,
        columns,
        group_size,
    )


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _groups(rows: int, group_size: int) -> int:
    return 1 if not group_size else -(-rows // group_size)


def _places(bits: int) -> list[int]:
    """Which two of four are kept, by the four bits that say which are not zero, in ascending order."""
    zeros_last = sorted(range(_FOUR), key=lambda place: not bits >> place & 1)
    return sorted(zeros_last[:_KEPT])


def is_sparse(integers: Tensor) -> bool:
    """Whether a weight [K, N] of 4-bit integers is 2:4-sparse."""
    missing = -len(integers) % _FOUR
    padded_integers = torch.nn.functional.pad(integers, (0, 0, 0, missing), value=_ZERO)
    fours = padded_integers.view(-1, _FOUR, integers.shape[1])
    return bool(((fours != _ZERO).sum(1) <= _KEPT).all())


def _kept(integers: Tensor) -> tuple[Tensor, Tensor]:
    """The kept numbers and their places, each [2, K' / 4, N'] uint8.

    Raises:
        ValueError: more than two of four rows of a column are not zero.
    """
    fours = integers.view(-1, _FOUR, integers.shape[1])
    found = fours != _ZERO
    wrong = (found.sum(1) > _KEPT).nonzero()
    if len(wrong):
        four, column = wrong[0].tolist()
        raise ValueError(
            f"not 2:4-sparse: {int(found[four, :, column].sum())} of the rows {_FOUR * four} to "
            f"{_FOUR * four + _FOUR - 1} of column {column} are not zero, of {len(wrong)} such places"
        )
    powers = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=integers.device)[:, None]
    table = torch.tensor([_places(bits) for bits in range(1 << _FOUR)], device=integers.device)
    places = table[(found * powers).sum(1)].transpose(1, 2)
    return fours.gather(1, places).transpose(0, 1), places.transpose(0, 1).to(torch.uint8)


def _pack_numbers(numbers: Tensor) -> Tensor:
    """[K' / 64, N' / 64, 2, 32, 4] int32 of [2, K' / 4, N']."""
    # First or second kept; slab, step, half and t of a four; slab, c, word and which of two columns.
    split = numbers.reshape(_KEPT, -1, 2, 2, 4, numbers.shape[2] // SLAB_COLUMNS, 8, 4, 2)
    return _words(split.permute(1, 5, 2, 6, 4, 7, 0, 3, 8).flatten(6)).flatten(3, 4)


def _pack_places(places: Tensor) -> Tensor:
    """[K' / 64, N' / 64, 1, 32, 4] int32 of [2, K' / 4, N']."""
    pairs = places[0] | places[1] << 2
    # Slab, step, half and which of its fours; slab, c, i, selector and which of two columns.
    split = pairs.reshape(-1, 2, 2, 4, pairs.shape[1] // SLAB_COLUMNS, 8, 2, 2, 2)
    return _words(split.permute(0, 4, 5, 7, 2, 1, 6, 8, 3).flatten(7)).flatten(5).flatten(2, 4).unsqueeze(2)


def _words(numbers: Tensor) -> Tensor:
    """Eight numbers of 4 bits each, [..., 8] uint8, as int32, the first in the lowest bits."""
    return (numbers[..., 0::2] | numbers[..., 1::2] << 4).contiguous().view(torch.int32).squeeze(-1)


def _numbers(words: Tensor) -> Tensor:
    """What `_words` made words of."""
    data = words.contiguous().unsqueeze(-1).view(torch.uint8)
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def unpack(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """What was packed: integers [K, N] uint8 and scales [groups, N]."""
    down, across = packed.weights.shape[:2]
    words = _numbers(packed.weights)
    kept = words[:, :, :2].view(down, across, 2, 8, 4, 4, 2, 2, 2).permute(6, 0, 2, 7, 4, 1, 3, 5, 8)
    pairs = words[:, :, 2].view(down, across, 8, 2, 2, 2, 2, 2, 4).permute(0, 5, 4, 8, 1, 2, 6, 3, 7)
    numbers = kept.reshape(_KEPT, -1, across * SLAB_COLUMNS)
    places = pairs.reshape(-1, across * SLAB_COLUMNS)
    fours = torch.full((len(places), _FOUR, places.shape[1]), _ZERO, dtype=torch.uint8, device=words.device)
    for which in range(_KEPT):
        fours.scatter_(1, (places >> 2 * which & 3).long().unsqueeze(1), numbers[which].unsqueeze(1))
    integers = fours.flatten(0, 1)[: packed.rows, : packed.columns]
    return integers, packed.scales[: _groups(packed.rows, packed.group_size), : packed.columns]


def dequantized(packed: PackedWeight) -> Tensor:
    """The weight [K, N] in the type of its scales, as the kernel has it."""
    integers, scales = unpack(packed)
    by_row = scales.repeat_interleave(packed.group_size or packed.rows, dim=0)[: packed.rows]
    return (integers.to(torch.int16) - _ZERO).to(scales.dtype) * by_row


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
    bias: bool,
    gpu: Gpu,
    table: Table = NOTHING,
) -> Plan | Fallback:
    """Choose how to run one shape: as was measured to be fastest, or is predicted to be.

    Args:
        m, n, k: sizes of the product, not padded; any.
        group_size: rows that share a scale; 0 for all.
        dtype: of activations and scales.
        bias: whether there is one.
        gpu: where it runs.
        table: what was measured.
    """
    reason = _reason_not_to(m, group_size, dtype, gpu)
    if reason:
        return Fallback(reason)
    found = candidates(m, n, k, group_size=group_size, dtype=dtype, bias=bias, gpu=gpu)
    case = Case("sparse_w4a16", m, n, k, str(dtype), group_size)
    return table.choice(found, case, gpu) or min(
        found.values(), key=lambda plan: predicted(plan, m, n, k, group_size=group_size, gpu=gpu)
    )


def candidates(
    m: int, n: int, k: int, *, group_size: int, dtype: torch.dtype, bias: bool, gpu: Gpu
) -> dict[Configuration, Plan]:
    """All that `plan` chooses from, of equal ones the first."""
    columns, tiles = -(-n // BLOCK_COLUMNS), -(-k // TILE_K)
    return {
        (tile_m, splits): _tiled(m, n, tile_m, splits, group_size, dtype, bias)
        for tile_m in _STAGES
        if -(-m // tile_m) <= _MOST_BLOCKS and shared_bytes(tile_m, group_size) <= gpu.shared_bytes
        for splits in ways_to_split(columns * -(-m // tile_m), tiles, _FEWEST_TILES, gpu)
    }


def _tiled(m: int, n: int, tile_m: int, splits: int, group_size: int, dtype: torch.dtype, bias: bool) -> Plan:
    kernel = Kernel(
        "sparse_w4a16",
        (
            ("ELEMENT", ELEMENTS[dtype]),
            ("TILE_M", tile_m),
            ("WARPS_N", _WARPS_N),
            ("WARPS_K", _WARPS_K),
            ("STAGES", _STAGES[tile_m]),
            ("GROUP", group_size),
            ("BIAS", int(bias and splits == 1)),
            ("SPLIT", int(splits > 1)),
        ),
    )
    grid = (-(-n // BLOCK_COLUMNS), -(-m // tile_m), splits)
    product = Launch(kernel, grid, _THREADS, shared_bytes(tile_m, group_size))
    return Plan(product, splits, addition(m, _up(n, _AT_ONCE), dtype, bias=bias) if splits > 1 else None)


def weight_bytes(n: int, k: int, *, group_size: int) -> int:
    """Of a packed weight, padded."""
    columns, rows = _up(n, BLOCK_COLUMNS), _up(k, TILE_K)
    return rows * columns * 3 // 8 + _groups(rows, group_size) * columns * 2


def predicted(plan: Plan, m: int, n: int, k: int, *, group_size: int, gpu: Gpu) -> float:
    """Seconds of a plan, see `planish.codegen.cuda.predict`."""
    columns, rows, splits = plan.product.grid
    constants = dict(plan.product.kernel.constants)
    tile_m, stages = int(constants["TILE_M"]), int(constants["STAGES"])
    weight = weight_bytes(n, k, group_size=group_size)
    parts = 4.0 * m * n * splits if splits > 1 else 0.0
    kept_of_a_row = columns * BLOCK_COLUMNS * _up(k, TILE_K) * _KEPT / _FOUR
    work = predict.Work(
        bytes=weight + 2.0 * m * k + (parts or 2.0 * m * n),
        cached_bytes=weight * rows + 2.0 * m * k * columns,
        operations=2.0 * rows * tile_m * kept_of_a_row,
        lane_operations=rows * kept_of_a_row * _WIDENING,
        blocks=columns * rows * splits,
        threads=plan.product.threads,
        shared_bytes=plan.product.shared_bytes,
        flying_bytes=plan.product.shared_bytes * (stages - 1) // stages,
    )
    # Tensor cores take no longer for what is kept of four weights than for two that are dense.
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
    if m > _MOST_BLOCKS * max(_STAGES):
        return f"{m} rows: a grid has {_MOST_BLOCKS} blocks of {max(_STAGES)}"
    needed = shared_bytes(min(_STAGES), group_size)
    if needed > gpu.shared_bytes:
        return f"{needed} bytes of shared memory, and the GPU has {gpu.shared_bytes}"
    return ""


def shared_bytes(tile_m: int, group_size: int) -> int:
    """Of a block: the stages, in whose place the warps add up at the end."""
    weights = 3 * 512 * (TILE_K // SLAB_ROWS) * (BLOCK_COLUMNS // SLAB_COLUMNS)
    scales = TILE_K // (group_size or TILE_K) * BLOCK_COLUMNS * 2
    stage = tile_m * TILE_K * 2 + weights + scales
    return max(_STAGES[tile_m] * stage, tile_m * BLOCK_COLUMNS * 4)


def run(
    plan: Plan | Fallback, launcher: Launcher, x: Tensor, packed: PackedWeight, bias: Tensor | None
) -> Tensor:
    """The product [M, N] of x [M, K], contiguous, by the kernels of a plan, or by `reference`."""
    if isinstance(plan, Fallback):
        return reference(x, packed, bias)
    m, n, k = len(x), _up(packed.columns, _AT_ONCE), _up(packed.rows, _AT_ONCE)
    bias = None if bias is None else padded(bias, n)
    y = x.new_empty(m, n)
    operands: list[Argument] = [padded(x, k), packed.weights, packed.scales, bias]
    run_product(plan, launcher, operands, bias, y, k, packed.scales.shape[1])
    return y if n == packed.columns else y[:, : packed.columns].contiguous()
