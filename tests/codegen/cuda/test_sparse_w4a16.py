"""2:4-sparse 4-bit weights times 16-bit activations: packing, plans, and the kernel on the host."""

import shutil

import pytest
import torch
from cuda_simulator import SimulationError, Simulator, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.cuda import sparse_w4a16, w4a16
from planish.codegen.cuda.hardware import GPUS, Gpu
from planish.codegen.cuda.kernel import KERNELS, Kernel, Launch
from planish.codegen.cuda.products import Fallback, Plan

H100 = GPUS["H100"]


def sparse_integers(rows, columns, generator=None):
    """Random 4-bit integers [rows, columns]: of every four rows of a column some two, 8 elsewhere."""
    fours = -(-rows // 4)
    kept = torch.rand(fours, 4, columns, generator=generator).argsort(dim=1) < 2
    integers = torch.randint(0, 16, (4 * fours, columns), generator=generator, dtype=torch.uint8)
    return torch.where(kept.flatten(0, 1), integers, 8)[:rows]


def problem(m, n, k, group_size, dtype, *, bias=False, seed=0):
    """Random activations, a packed weight, a bias or None, and the product in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if not group_size else -(-k // group_size)
    integers = sparse_integers(k, n, generator)
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.005).to(dtype)
    x = torch.randn(m, k, generator=generator).to(dtype)
    added = torch.randn(n, generator=generator).to(dtype) if bias else None
    by_row = scales.double().repeat_interleave(group_size or k, dim=0)[:k]
    # The weight itself is rounded to 16 bits, as dequantising it would.
    weight = ((integers.double() - 8) * by_row).to(dtype).double()
    exact = x.double() @ weight + (0 if added is None else added.double())
    return x, sparse_w4a16.pack(integers, scales, group_size), added, exact


def assert_rounded(found, exact, x, packed):
    """Every output is the rounding of a number that differs from float64's by float32's sum at most."""
    weight = sparse_w4a16.dequantized(packed).double()
    # Of a sum of K products and a bias, each step rounded to 24 bits.
    bound = 2.0**-24 * (packed.rows + 1) * (x.double().abs() @ weight.abs() + exact.abs())
    assert (found >= (exact - bound).to(found.dtype)).all()
    assert (found <= (exact + bound).to(found.dtype)).all()
    # Which is nearly always the rounding of the exact product itself, and else its neighbour.
    rounded = exact.to(found.dtype)
    assert (found == rounded).double().mean() >= 0.99
    neighbours = (found.view(torch.int16).int() - rounded.view(torch.int16).int()).abs() <= 1
    assert neighbours.double().mean() >= 0.999


def planned(x, packed, bias):
    plan = sparse_w4a16.plan(
        len(x),
        packed.columns,
        packed.rows,
        group_size=packed.group_size,
        dtype=x.dtype,
        bias=bias is not None,
        gpu=H100,
    )
    assert isinstance(plan, Plan)
    return plan


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    group_size=st.sampled_from(sparse_w4a16.GROUP_SIZES),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_what_is_packed_can_be_unpacked(rows, columns, group_size, dtype):
    groups = 1 if not group_size else -(-rows // group_size)
    integers, scales = sparse_integers(rows, columns), torch.rand(groups, columns).to(dtype)
    found = sparse_w4a16.unpack(sparse_w4a16.pack(integers, scales, group_size))
    torch.testing.assert_close(found, (integers, scales), rtol=0, atol=0)


def test_three_bits_a_weight():
    packed = sparse_w4a16.pack(sparse_integers(1024, 512), torch.ones(1, 512).half(), 0)
    assert packed.weights.nbytes * 8 == 3 * 1024 * 512
    assert packed.bytes == packed.weights.nbytes + 2 * 512


def test_weights_that_cannot_be_packed():
    ones = torch.ones(1, 9).half()
    dense = torch.full((12, 9), 8, dtype=torch.uint8)
    dense[4:7, 3] = 1
    dense[8:12, 5] = 0
    with pytest.raises(ValueError, match="3 of the rows 4 to 7 of column 3 are not zero, of 2 such places"):
        sparse_w4a16.pack(dense, ones, 0)
    with pytest.raises(ValueError, match=r"expected scales \[1, 9\], found \[2, 9\], in groups of 32"):
        sparse_w4a16.pack(torch.full((12, 9), 8, dtype=torch.uint8), ones.expand(2, 9), 32)
    with pytest.raises(ValueError, match=r"expected integers of 4 bits in uint8, found .* up to 16"):
        sparse_w4a16.pack(torch.full((12, 9), 16, dtype=torch.uint8), ones, 0)


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "group_size", "dtype", "options"),
    [
        ((16, 256, 512), 128, torch.float16, {}),
        ((1, 261, 331), 32, torch.bfloat16, {"bias": True}),
        ((70, 130, 450), 0, torch.float16, {}),
        ((23, 250, 2300), 64, torch.bfloat16, {"bias": True}),  # its depth is split
    ],
    ids=["plain", "odd sizes", "one group", "split"],
)
def test_the_kernel_gives_the_rounded_product(sizes, group_size, dtype, options):
    x, packed, bias, exact = problem(*sizes, group_size, dtype, **options)
    plan = planned(x, packed, bias)
    assert (plan.splits > 1) == (sizes[2] == 2300)
    found = sparse_w4a16.run(plan, Simulator(order="shuffled"), x, packed, bias)
    assert_rounded(found, exact, x, packed)
    torch.testing.assert_close(sparse_w4a16.reference(x, packed, bias), found, rtol=2e-2, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize(
    ("m", "group_size", "tiles"),
    [*((12, 128, tiles) for tiles in range(1, 8)), *((33, 0, tiles) for tiles in range(1, 5))],
)
def test_every_number_of_tiles_goes_through_the_ring(m, group_size, tiles, late):
    """Of four stages, and of three: every residue, and fewer tiles than stages."""
    x, packed, bias, exact = problem(m, 256, 128 * tiles, group_size, torch.float16, seed=tiles)
    for order in ("forward", "backward", "shuffled"):
        simulator = Simulator(order=order, late=late, seed=tiles)
        found = sparse_w4a16.run(planned(x, packed, bias), simulator, x, packed, bias)
        assert_rounded(found, exact, x, packed)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.exhaustive)])
def test_sanitizers_find_nothing(sanitizer):
    x, packed, bias, exact = problem(13, 250, 700, 64, torch.float16, bias=True)
    simulator = Simulator(order="shuffled", sanitizer=sanitizer)
    found = sparse_w4a16.run(planned(x, packed, bias), simulator, x, packed, bias)
    assert_rounded(found, exact, x, packed)


@pytest.fixture
def instructions(tmp_path):
    """A folder of kernels with ``one``: a warp's product by each selector."""
    folder = shutil.copytree(KERNELS, tmp_path / "kernels")
    body = """
      const int lane = threadIdx.x;
      const uint32_t own[4] = {a[4 * lane], a[4 * lane + 1], a[4 * lane + 2], a[4 * lane + 3]};
      const uint32_t rows[4] = {b[4 * lane], b[4 * lane + 1], b[4 * lane + 2], b[4 * lane + 3]};
      float first[4] = {}, second[4] = {};
      multiply_add_sparse<Half, 0>(first, own, rows, metadata[lane]);
      multiply_add_sparse<Half, 1>(second, own, rows, metadata[lane]);
      for (int i = 0; i < 4; i++) c[4 * lane + i] = first[i], c[128 + 4 * lane + i] = second[i];"""
    parameters = "const uint32_t* a, const uint32_t* b, const uint32_t* metadata, float* c"
    text = f'#include "primitives.cuh"\nKERNEL void one({parameters}) {{{body}}}\n'
    (folder / "one.cu").write_text(text)
    return folder


@needs_compiler
def test_metadata_comes_from_the_lanes_that_the_selector_names(instructions):
    """As the layout of m16n8k32 in PTX has it; lanes 0 and 1 of four keep other places than lanes 2 and 3."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randint(-8, 8, (16, 8, 2), generator=generator).half()
    right = torch.randint(-8, 8, (32, 8), generator=generator).half()
    places = torch.rand(2, 16, 8, 4, generator=generator).argsort(-1)[..., :2].sort().values
    nibbles = places[..., 0] | places[..., 1] << 2
    a, b = torch.zeros(32, 4, 2).half(), torch.zeros(32, 4, 2).half()
    metadata, expected = torch.zeros(32, dtype=torch.int64), torch.zeros(2, 32, 4)
    left = torch.zeros(2, 16, 8, 4).half().scatter(-1, places, kept.expand(2, -1, -1, -1)).flatten(2)
    products = left.float() @ right.float()
    for lane in range(32):
        row, t = lane // 4, lane % 4
        for i in range(4):
            a[lane, i] = kept[row + 8 * (i % 2), t + 4 * (i // 2)]
            b[lane, i] = right[8 * i + 2 * t : 8 * i + 2 * t + 2, row]
            expected[:, lane, i] = products[:, row + 8 * (i // 2), 2 * t + i % 2]
            fours = nibbles[t // 2, :, 4 * (t % 2) + i]
            metadata[lane] |= fours[row] << 4 * i | fours[row + 8] << 16 + 4 * i
    words = torch.where(metadata < 2**31, metadata, metadata - 2**32).to(torch.int32)
    simulator, launch, found = (
        Simulator(kernels=instructions),
        Launch(Kernel("one"), (1, 1, 1), 32),
        expected + 1,
    )
    simulator.launch(launch, [a, b, words, found])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    words[7] = 0
    with pytest.raises(SimulationError, match="not in ascending order"):
        simulator.launch(launch, [a, b, words, found])


def plan_of(m=16, n=4096, k=4096, group_size=128, dtype=torch.float16, gpu=H100):
    return sparse_w4a16.plan(m, n, k, group_size=group_size, dtype=dtype, bias=False, gpu=gpu)


def test_plans():
    plan = plan_of(m=1)
    # 16 blocks of 256 columns; in eight parts of four tiles they are 128 of 132 processors.
    assert plan.product.grid == (16, 1, 8)
    assert plan.addition is not None
    wide = plan_of(m=512, n=8192)
    assert wide.product.grid == (32, 8, 1)
    assert wide.addition is None
    tiles = [dict(plan_of(m=m, n=28672).product.kernel.constants)["TILE_M"] for m in (1, 8, 9, 17, 33, 128)]
    assert tiles == [8, 8, 16, 32, 64, 64]


def test_predictions():
    sizes, options = (1, 28672, 4096), {"group_size": 128, "gpu": H100}
    sparse = sparse_w4a16.predicted(plan_of(*sizes), *sizes, **options)
    dense = w4a16.plan(*sizes, **options, dtype=torch.float16, shifted=False, bias=False)
    # One row waits for weights, of which there are three bits instead of four, and for what is not hidden.
    assert 0.7 < sparse / w4a16.predicted(dense, *sizes, **options, shifted=False) < 0.8
    sizes = (4096, 8192, 8192)
    # Many rows wait for tensor cores, which leave out half of the products.
    sparse = sparse_w4a16.predicted(plan_of(*sizes), *sizes, **options)
    assert 0.5 < sparse / (2.0 * 4096 * 8192 * 8192 / (H100.half_rate * H100.warp_share)) < 0.65


@pytest.mark.parametrize("m", [1, 16, 32, 64])
def test_a_block_fits_on_small_gpus(m):
    assert isinstance(plan_of(m=m, group_size=32, gpu=GPUS["L4"]), Plan)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16"),
        ({"group_size": 48}, "groups of 48 rows"),
        ({"m": 0}, "no rows"),
        ({"m": 5_000_000}, "a grid has 65535 blocks of 64"),
        ({"gpu": Gpu("T4", (7, 5), 40, 64 * 1024, 3e11, 65e12, 130e12, 1e9)}, "capability 7.5"),
        ({"gpu": Gpu("small", (8, 0), 40, 48 * 1024, 3e11, 65e12, 130e12, 1e9)}, "bytes of shared memory"),
    ],
)
def test_reasons_to_fall_back(options, reason):
    found = plan_of(**options)
    assert isinstance(found, Fallback)
    assert reason in found.reason
