"""4-bit weights times 16-bit activations: packing, plans, and the kernel on the host against float64."""

import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen.cuda import w4a16
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.products import Fallback, Plan

H100 = GPUS["H100"]


def problem(m, n, k, group_size, dtype, *, shifted=False, bias=False, seed=0):
    """Random activations, a packed weight, a bias or None, and the product in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if not group_size else -(-k // group_size)
    integers = torch.randint(0, 16, (k, n), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.005).to(dtype)
    zero_points = torch.randint(0, 16, (groups, n), generator=generator) if shifted else None
    x = torch.randn(m, k, generator=generator).to(dtype)
    added = torch.randn(n, generator=generator).to(dtype) if bias else None
    centred = integers.double() - (8 if zero_points is None else by_row(zero_points.double(), group_size, k))
    # The weight itself is rounded to 16 bits, as dequantising it would.
    weight = (centred * by_row(scales.double(), group_size, k)).to(dtype).double()
    exact = x.double() @ weight + (0 if added is None else added.double())
    return x, w4a16.pack(integers, scales, zero_points, group_size), added, exact


def by_row(groups, group_size, rows):
    return groups.repeat_interleave(group_size or rows, dim=0)[:rows]


def assert_rounded(found, exact, x, packed):
    """Every output is the rounding of a number that differs from float64's by float32's sum at most."""
    weight = w4a16.dequantized(packed).double()
    # Of a sum of K products and a bias, each step rounded to 24 bits.
    bound = 2.0**-24 * (packed.rows + 1) * (x.double().abs() @ weight.abs() + exact.abs())
    assert (found >= (exact - bound).to(found.dtype)).all()
    assert (found <= (exact + bound).to(found.dtype)).all()
    # Which is nearly always the rounding of the exact product itself.
    assert (found == exact.to(found.dtype)).double().mean() >= 0.99


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 300),
    group_size=st.sampled_from(w4a16.GROUP_SIZES),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_what_is_packed_can_be_unpacked(rows, columns, group_size, shifted, dtype):
    groups = 1 if not group_size else -(-rows // group_size)
    integers = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    scales = torch.rand(groups, columns).to(dtype)
    zero_points = torch.randint(0, 16, (groups, columns), dtype=torch.uint8) if shifted else None
    found = w4a16.unpack(w4a16.pack(integers, scales, zero_points, group_size))
    torch.testing.assert_close(found, (integers, scales, zero_points), rtol=0, atol=0)


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"expected scales \[2, 8\], found \[1, 8\], in groups of 32"):
        w4a16.pack(torch.zeros(64, 8, dtype=torch.uint8), torch.ones(1, 8), None, 32)


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "group_size", "dtype", "options"),
    [
        ((16, 256, 512), 128, torch.float16, {}),
        ((1, 261, 331), 32, torch.bfloat16, {"shifted": True, "bias": True}),
        ((50, 128, 320), 0, torch.float16, {"shifted": True}),
        ((23, 256, 2048), 64, torch.bfloat16, {"bias": True}),  # its depth is split
    ],
    ids=["plain", "odd sizes", "one group", "split"],
)
def test_the_kernel_gives_the_rounded_product(sizes, group_size, dtype, options):
    x, packed, bias, exact = problem(*sizes, group_size, dtype, **options)
    plan = planned(x, packed, bias)
    assert (plan.splits > 1) == (sizes[2] == 2048)
    found = w4a16.run(plan, Simulator(order="shuffled"), x, packed, bias)
    assert_rounded(found, exact, x, packed)
    torch.testing.assert_close(w4a16.reference(x, packed, bias), found, rtol=2e-2, atol=1e-3)


def planned(x, packed, bias):
    plan = w4a16.plan(
        len(x),
        packed.columns,
        packed.rows,
        group_size=packed.group_size,
        dtype=x.dtype,
        shifted=packed.shifts is not None,
        bias=bias is not None,
        gpu=H100,
    )
    assert isinstance(plan, Plan)
    return plan


@needs_compiler
@pytest.mark.parametrize("late", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("tiles", range(1, 9))
def test_every_number_of_tiles_goes_through_the_ring(tiles, late):
    """Of four stages: every residue, and fewer tiles than stages."""
    x, packed, bias, exact = problem(5, 256, 64 * tiles, 64, torch.float16, seed=tiles)
    for order in ("forward", "backward", "shuffled"):
        simulator = Simulator(order=order, late=late, seed=tiles)
        assert_rounded(w4a16.run(planned(x, packed, bias), simulator, x, packed, bias), exact, x, packed)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.exhaustive)])
def test_sanitizers_find_nothing(sanitizer):
    x, packed, bias, exact = problem(13, 256, 320, 64, torch.float16, bias=True)
    simulator = Simulator(order="shuffled", sanitizer=sanitizer)
    assert_rounded(w4a16.run(planned(x, packed, bias), simulator, x, packed, bias), exact, x, packed)


def plan_of(m=16, n=4096, k=4096, group_size=128, dtype=torch.float16, gpu=H100):
    return w4a16.plan(m, n, k, group_size=group_size, dtype=dtype, shifted=False, bias=False, gpu=gpu)


def test_plans():
    plan = plan_of()
    # 16 blocks of 256 columns; in eight parts of eight tiles they are 128 of 132 processors.
    assert plan.product.grid == (16, 1, 8)
    assert plan.addition is not None
    wide = plan_of(m=512, n=8192)
    assert wide.product.grid == (32, 8, 1)
    assert wide.addition is None
    assert dict(wide.product.kernel.constants)["TILE_M"] == 64
    assert wide.product.shared_bytes <= GPUS["RTX 3090"].shared_bytes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "takes float16 and bfloat16"),
        ({"group_size": 48}, "groups of 48 rows"),
        ({"m": 0}, "no rows"),
        ({"gpu": w4a16.Gpu("T4", (7, 5), 40, 64 * 1024, 3e11, 65e12, 130e12, 1e9)}, "capability 7.5"),
        (
            {"gpu": w4a16.Gpu("small", (8, 0), 40, 32 * 1024, 3e11, 65e12, 130e12, 1e9)},
            "bytes of shared memory",
        ),
    ],
)
def test_reasons_to_fall_back(options, reason):
    found = plan_of(**options)
    assert isinstance(found, Fallback)
    assert reason in found.reason


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "shifted", "dtype"),
    [(100, 300, 32, True, torch.bfloat16), (331, 261, 0, False, torch.float16)],
    ids=["groups, zero points", "one group"],
)
def test_the_kernel_dequantises(rows, columns, group_size, shifted, dtype):
    _, packed, _, _ = problem(1, columns, rows, group_size, dtype, shifted=shifted)
    found = w4a16.dequantize(Simulator(order="shuffled"), packed)
    assert torch.equal(found, w4a16.dequantized(packed))
