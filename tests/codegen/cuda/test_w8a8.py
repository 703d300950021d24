"""int8 activations times int8 and int4 weights: packing, plans, and the kernel on the host."""

import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.cuda import w8a8
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.products import Fallback, Plan

H100 = GPUS["H100"]


def problem(m, n, k, group_size, bits, *, bias=False, seed=0):
    """Activations, their scales, a packed weight, a bias or None, and the product in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups, half = 1 if not group_size else -(-k // group_size), 1 << (bits - 1)
    integers = torch.randint(-half, half, (k, n), generator=generator, dtype=torch.int8)
    scales = torch.rand(groups, n, generator=generator) * 0.02 + 0.005
    x = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    x_scales = torch.rand(m, generator=generator) + 0.1
    added = torch.randn(n, generator=generator) if bias else None
    weight = integers.double() * scales.double().repeat_interleave(group_size or k, dim=0)[:k]
    exact = x.double() @ weight * x_scales.double()[:, None]
    exact = exact if added is None else exact + added.double()
    return x, x_scales, w8a8.pack(integers, scales, group_size=group_size, bits=bits), added, exact


def run(simulator, x, x_scales, packed, bias, dtype):
    plan = w8a8.plan(
        len(x),
        packed.columns,
        packed.rows,
        group_size=packed.group_size,
        bits=packed.bits,
        dtype=dtype,
        bias=bias is not None,
        gpu=H100,
    )
    assert isinstance(plan, Plan)
    return w8a8.run(plan, simulator, x, x_scales, packed, None if bias is None else bias.to(dtype), dtype)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    group_size=st.sampled_from([0, 32, 96, 128]),
    bits=st.sampled_from([4, 8]),
)
def test_what_is_packed_can_be_unpacked(rows, columns, group_size, bits):
    half = 1 << (bits - 1)
    integers = torch.randint(-half, half, (rows, columns), dtype=torch.int8)
    groups = 1 if not group_size else -(-rows // group_size)
    packed = w8a8.pack(integers, torch.ones(groups, columns), group_size=group_size, bits=bits)
    assert torch.equal(w8a8.unpack(packed), integers)


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"expected scales \[1, 8\], found \[2, 8\], groups of 0, 8 bits"):
        w8a8.pack(torch.zeros(64, 8, dtype=torch.int8), torch.ones(2, 8), group_size=0, bits=8)


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "group_size", "bits", "dtype", "bias"),
    [
        ((16, 256, 512), 0, 8, torch.float16, False),
        ((70, 270, 336), 0, 4, torch.bfloat16, True),
        ((33, 101, 529), 32, 4, torch.float32, True),
        ((20, 256, 640), 128, 8, torch.float16, True),
    ],
    ids=["int8", "int4, odd sizes", "int4 in groups", "int8 in groups"],
)
def test_the_kernel_gives_the_rounded_product(sizes, group_size, bits, dtype, bias):
    x, x_scales, packed, added, exact = problem(*sizes, group_size, bits, bias=bias)
    found = run(Simulator(order="shuffled", seed=3), x, x_scales, packed, added, dtype)
    rounded_bias = None if added is None else added.to(dtype)
    if added is not None:
        exact = exact - added.double() + rounded_bias.double()
    reference = w8a8.reference(x, x_scales, packed, rounded_bias, dtype)
    torch.testing.assert_close(reference, exact.to(dtype), rtol=1e-6, atol=1e-6)
    if dtype != torch.float32:
        assert (found == exact.to(dtype)).double().mean() >= 0.999
    # Products of integers are exact; rounded in float32 are scales, bias and sums over groups.
    bound = torch.finfo(dtype).eps * exact.abs() + 2e-6 * exact.abs().max()
    assert ((found.double() - exact).abs() <= bound).all()


@needs_compiler
@pytest.mark.parametrize(
    ("tile_m", "splits", "group_size", "bits", "dtype"),
    [(128, 1, 0, 8, torch.float16), (64, 2, 0, 4, torch.float32), (32, 2, 96, 4, torch.bfloat16)],
    ids=["two warps along the rows", "split", "split in groups across parts"],
)
def test_other_tiles(tile_m, splits, group_size, bits, dtype):
    x, x_scales, packed, bias, exact = problem(133, 264, 912, group_size, bits, bias=True)
    bias, exact = bias.to(dtype), exact - bias.double() + bias.to(dtype).double()
    plan = w8a8._tiled(133, 264, tile_m, splits, 2, group_size, bits, dtype, True)
    found = w8a8.run(plan, Simulator(order="shuffled", seed=4), x, x_scales, packed, bias, dtype)
    bound = torch.finfo(dtype).eps * exact.abs() + 2e-6 * exact.abs().max()
    assert ((found.double() - exact).abs() <= bound).all()


def test_plans():
    def tiles(m, n, k, **options):
        plan = w8a8.plan(
            m,
            n,
            k,
            **{"group_size": 0, "bits": 8, "dtype": torch.float16, "bias": False, "gpu": H100, **options},
        )
        constants = dict(plan.product.kernel.constants)
        return constants["TILE_M"], constants["STAGES"], plan.splits

    assert tiles(1, 4096, 4096) == (16, 3, 8)  # 16 blocks would leave most of 132 processors idle
    assert tiles(4096, 8192, 8192) == (128, 3, 1)
    assert tiles(4096, 8192, 8192, group_size=64)[0] == 32  # two sets of sums
    assert tiles(4096, 8192, 8192, gpu=GPUS["L4"]) == (128, 2, 1)  # 99 KB of shared memory


@needs_compiler
@pytest.mark.parametrize("tiles", range(1, 7))
def test_every_number_of_tiles_goes_through_the_ring(tiles):
    """Of three stages: every residue, and fewer tiles than stages."""
    x, x_scales, packed, bias, exact = problem(5, 256, 128 * tiles, 0, 8, seed=tiles)
    for order, late in (("forward", True), ("backward", False), ("shuffled", True), ("shuffled", False)):
        found = run(Simulator(order=order, late=late, seed=tiles), x, x_scales, packed, bias, torch.float32)
        torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=0)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.exhaustive)])
def test_sanitizers_find_nothing(sanitizer):
    x, x_scales, packed, bias, exact = problem(13, 200, 528, 32, 4)
    simulator = Simulator(order="shuffled", sanitizer=sanitizer)
    found = run(simulator, x, x_scales, packed, bias, torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "gives float16, bfloat16 and float32"),
        ({"group_size": 16}, "multiples of 32"),
        ({"k": 1 << 17}, "do not fit in 32 bits"),
        ({"m": 0}, "no rows"),
        ({"gpu": w8a8.Gpu("T4", (7, 5), 40, 64 * 1024, 3e11, 65e12, 130e12, 1e9)}, "capability 7.5"),
        (
            {"gpu": w8a8.Gpu("small", (8, 0), 40, 48 * 1024, 3e11, 65e12, 130e12, 1e9)},
            "bytes of shared memory",
        ),
    ],
)
def test_reasons_to_fall_back(options, reason):
    sizes = {"m": 64, "n": 4096, "k": 4096, "group_size": 0, "bits": 8, "dtype": torch.float16}
    found = w8a8.plan(**{**sizes, "bias": False, "gpu": H100, **options})
    assert isinstance(found, Fallback)
    assert reason in found.reason
