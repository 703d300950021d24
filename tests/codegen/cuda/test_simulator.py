"""The simulator finds what kernels must not do: in small kernels, and in ours with a bug put in."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from cuda_simulator import SimulationError, Simulator, needs_compiler
from planish.codegen.cuda import decode_attention, rows, sparse_w4a16, w4a16
from planish.codegen.cuda.kernel import KERNELS, Kernel, Launch
from planish.codegen.cuda.products import Plan
from planish.codegen.cuda.rows import Quantization

pytestmark = needs_compiler


def run(tmp_path: Path, body: str, *, threads: int = 64, shared_bytes: int = 256, **options) -> torch.Tensor:
    """Run a kernel ``small(int* out)`` of this body."""
    shutil.copytree(KERNELS, tmp_path / "kernels")
    text = f'#include "primitives.cuh"\nKERNEL void small(int* out) {{ SHARED_MEMORY(shared); {body} }}\n'
    (tmp_path / "kernels" / "small.cu").write_text(text)
    out = torch.full((threads,), -1, dtype=torch.int32)
    launch = Launch(Kernel("small"), (1, 1, 1), threads, shared_bytes)
    Simulator(kernels=tmp_path / "kernels", **options).launch(launch, [out])
    return out


def test_threads_exchange_numbers(tmp_path):
    body = "out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1);"
    assert run(tmp_path, body, order="shuffled").tolist() == [index ^ 1 for index in range(64)]


def test_copies_land_when_they_are_waited_for(tmp_path):
    body = """
      int* numbers = reinterpret_cast<int*>(shared);
      if (threadIdx.x == 0) { copy_async(shared, out, true); commit_copies(); }
      out[32] = numbers[0];
      if (threadIdx.x == 0) wait_for_copies<0>();
      __syncthreads();
      out[33] = numbers[0];"""
    assert run(tmp_path, body, threads=34)[33] == -1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "if (threadIdx.x % 2) __syncthreads(); else __syncwarp();",
            "deadlock: thread 0 waits at __syncwarp",
        ),
        ("if (threadIdx.x % 2) __syncwarp(); else __shfl_sync(~0u, 1, 0);", "the warp diverges"),
        ("if (threadIdx.x % 2) __syncwarp(0x55555555);", "not in its own mask"),
        ("__syncwarp(threadIdx.x % 2 ? ~0u : 0x55555555u);", "wait with another mask"),
        ("copy_async(shared + 256, out, true);", "outside shared memory"),
        ("copy_async(shared + 8, out, true);", "not a multiple of 16"),
        ("copy_async(shared, out, true); commit_copies();", "before its asynchronous copies were waited for"),
        ("copy_async(shared, out, true);", "before its asynchronous copies were committed"),
        ("uint32_t m[4]; load_matrices(m, shared + 4);", "ldmatrix: an address is not a multiple of 16"),
        ("out[blockDim.x] = 1;", "ended with -11"),
        ("shared[256] = 1;", "ended with -11"),
    ],
)
def test_what_no_kernel_may_do(tmp_path, body, message):
    with pytest.raises(SimulationError, match=message):
        run(tmp_path, body)


def test_races_are_seen_by_the_thread_sanitizer(tmp_path):
    body = "shared[0] = threadIdx.x; __syncwarp(); out[threadIdx.x] = shared[0];"
    with pytest.raises(SimulationError, match="data race"):
        run(tmp_path, body, sanitizer="thread")


def test_barriers_order_what_the_thread_sanitizer_sees(tmp_path):
    body = "if (threadIdx.x == 0) shared[0] = 7; __syncthreads(); out[threadIdx.x] = shared[0];"
    assert (run(tmp_path, body, sanitizer="thread") == 7).all()


def product(simulator: Simulator) -> None:
    """W4A16 with padding everywhere; the last of its five tiles lies where sums are added up."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 312, generator=generator).half()
    integers = torch.randint(0, 16, (312, 264), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(5, 264, generator=generator) * 0.02 + 0.005).half()
    packed = w4a16.pack(integers, scales, None, 64)
    plan = w4a16.plan(
        13,
        264,
        312,
        group_size=64,
        dtype=x.dtype,
        shifted=False,
        bias=False,
        gpu=w4a16.Gpu("", (8, 0), 1, 1 << 18, 1, 1, 1, 1),
    )
    assert isinstance(plan, Plan)
    found = w4a16.run(plan, simulator, x, packed, None)
    torch.testing.assert_close(found, w4a16.reference(x, packed), rtol=5e-3, atol=5e-3)


def sparse_product(simulator: Simulator) -> None:
    """Sparse W4A16 with padding everywhere, five tiles, and groups that end within a tile."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 600, generator=generator).half()
    integers = torch.randint(0, 16, (600, 264), generator=generator, dtype=torch.uint8)
    places = torch.rand(150, 4, 264, generator=generator).argsort(dim=1).flatten(0, 1)
    scales = (torch.rand(10, 264, generator=generator) * 0.02 + 0.005).half()
    packed = sparse_w4a16.pack(torch.where(places < 2, integers, 8), scales, 64)
    gpu = w4a16.Gpu("", (8, 0), 1, 1 << 18, 1, 1, 1, 1)
    plan = sparse_w4a16.plan(13, 264, 600, group_size=64, dtype=x.dtype, bias=False, gpu=gpu)
    assert isinstance(plan, Plan)
    found = sparse_w4a16.run(plan, simulator, x, packed, None)
    torch.testing.assert_close(found, sparse_w4a16.reference(x, packed), rtol=5e-3, atol=5e-3)


def transform(simulator: Simulator) -> None:
    """Rows that are transformed in registers, lanes and shared memory, and quantised."""
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(0))
    found = rows.transform(simulator, x, None, scale=1 / 32, quantization=Quantization())
    expected = rows.quantize_reference(rows.transform_reference(x, None, scale=1 / 32), Quantization())
    assert (found.values.int() - expected.values.int()).abs().max() <= 1
    torch.testing.assert_close(found.scales, expected.scales)


def attention(simulator: Simulator) -> None:
    """A long and a short text in three parts, of which the short one fills one; four bits."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 3, 64, generator=generator).half()
    integers = torch.randint(-8, 8, (2, 2, 1, 1501, 64), generator=generator, dtype=torch.int8)
    scales = torch.rand(2, 1, 64, generator=generator) * 0.2 + 0.1
    cache = decode_attention.Cache(*decode_attention.pack_four_bits(integers), *scales)
    lengths = torch.tensor([1500, 45], dtype=torch.int32)
    plan = decode_attention.plan(
        2,
        3,
        1,
        64,
        1536,
        bits=4,
        dtype=query.dtype,
        scale=0.125,
        gpu=decode_attention.Gpu("", (8, 0), 1024, 1 << 18, 1, 1, 1, 1),
    )
    assert isinstance(plan, decode_attention.Plan)
    assert plan.splits == 3
    found = decode_attention.run(plan, simulator, query, cache, lengths)
    expected = decode_attention.reference(query, cache, lengths, scale=0.125)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


BUGS = {
    "no barrier in the ring": ("ring.cuh", "__syncthreads();  // this tile", "// this tile"),
    "copies are waited for too late": (
        "ring.cuh",
        "wait_for_copies<STAGES - 2>",
        "wait_for_copies<STAGES - 1>",
    ),
    "the next tile overwrites this one": ("ring.cuh", "next % STAGES", "tile % STAGES"),
    "no barrier before the sums are read": (
        "ring.cuh",
        "    __syncthreads();\n    if (warp_k == 0)",
        "    if (warp_k == 0)",
    ),
    "no barrier before the sums are written": (
        "ring.cuh",
        "__syncthreads();  // what is there",
        "// what is there",
    ),
    "a lane does not take part": (
        "w4a16.cu",
        "transpose_of_four(pairs, lane % 4);",
        "if (lane < 31) transpose_of_four(pairs, lane % 4);",
    ),
    "rows lie elsewhere than they are read": (
        "tiles.cuh",
        "(chunk ^ row) & 7",
        "(chunk ^ row >> threadIdx.x % 2) & 7",
    ),
    "rows beyond the last are stored": ("w4a16.cu", "if (row < problem.m && column", "if (column"),
    "columns beyond the last are stored": (
        "w4a16.cu",
        "row < problem.m && column < problem.n",
        "row < problem.m",
    ),
    "weights of the next slab": ("w4a16.cu", "first_k / 16 + step)", "first_k / 16 + step + 1)"),
    "numbers are not centred": ("widen.cuh", "0xe408e408", "0xe400e400"),
    "scales of the group before": (
        "w4a16.cu",
        "first_group + group)",
        "first_group + group - (first_group > 0))",
    ),
    "a selector of the other lanes": (
        "sparse_w4a16.cu",
        "<ELEMENT, 1>(sums[tile][3]",
        "<ELEMENT, 0>(sums[tile][3]",
    ),
    "metadata of the other step": (
        "sparse_w4a16.cu",
        "w[0], rows, metadata[2 * step]",
        "w[0], rows, metadata[2 - 2 * step]",
    ),
    "places in descending order": (
        "sparse_w4a16.cu",
        "load_words(chunks + 2 * 512, metadata);",
        "load_words(chunks + 2 * 512, metadata);"
        "for (uint32_t& four : metadata) four = (four & 0x33333333) << 2 | (four >> 2 & 0x33333333);",
    ),
    "scales of the neighbouring column": ("sparse_w4a16.cu", "operand % 2", "operand / 2"),
    "scales of the slab's first rows": ("sparse_w4a16.cu", "(slab * kSlabK +", "(0 * slab +"),
    "rows of x in another order": ("sparse_w4a16.cu", "step * 4 + lane / 8", "step * 4 + (lane / 8 ^ 1)"),
    "columns of y in another order": ("sparse_w4a16.cu", "[i % 2 * 2 + odd]", "[odd * 2 + i % 2]"),
    "no barrier in the transform": (
        "hadamard.cu",
        "    __syncthreads();\n    transform_in_shared",
        "    transform_in_shared",
    ),
    "lanes of the wrong bit": ("hadamard.cu", "v[i], 1 << bit", "v[i], 2 << bit % 4"),
    "the largest of one warp only": (
        "rows.cuh",
        "for (int warp = 1; warp < kWarps; warp++)",
        "for (int warp = 1; warp < 1; warp++)",
    ),
    "lanes read a tile before it is there": (
        "decode_attention.cu",
        "__syncwarp();  // this tile",
        "// this tile",
    ),
    "a warp's tiles are waited for too late": (
        "decode_attention.cu",
        "wait_for_copies<STAGES - 2>",
        "wait_for_copies<STAGES - 1>",
    ),
    "a warp's next tile overwrites this one": ("decode_attention.cu", "next % STAGES", "tile % STAGES"),
    "no barrier before queries are used": (
        "decode_attention.cu",
        "__syncthreads();  // queries",
        "// queries",
    ),
    "no barrier before warps are joined": (
        "decode_attention.cu",
        "__syncthreads();  // all warps have left",
        "// all warps have left",
    ),
    "the token beyond the last is seen": (
        "decode_attention.cu",
        "place = token < tokens",
        "place = token <= tokens",
    ),
    "the running sum is not rescaled": ("decode_attention.cu", "softmax.sum *= rescale;", ""),
    "queries lose their fine parts": (
        "decode_attention.cu",
        "uint4{coarse[0], fine[0], coarse[1], fine[1]}",
        "uint4{coarse[0], 0, coarse[1], 0}",
    ),
    "the last tiles have no block": (
        "decode_attention.cu",
        "(tiles + splits - 1) / splits",
        "tiles / splits",
    ),
    "parts are joined as they are": ("join.cuh", "exp2f(own[head_size] - all.largest)", "1"),
    "a pair of numbers is taken for neighbours": (
        "decode_attention.cu",
        "channel + kWordPairs)",
        "channel + 1)",
    ),
}
CHECKS = {
    "decode_attention.cu": [attention],
    "join.cuh": [attention],
    "hadamard.cu": [transform],
    "rows.cuh": [transform],
    "ring.cuh": [product, sparse_product],
    "sparse_w4a16.cu": [sparse_product],
}
"""What a file is checked with, if not a product alone; each of them has to fail."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", list(BUGS))
def test_a_bug_is_found(bug, tmp_path):
    """By the numbers, by the simulator, or by the thread sanitizer, in some order of threads and copies."""
    file, text, replacement = BUGS[bug]
    shutil.copytree(KERNELS, tmp_path / "kernels")
    path = tmp_path / "kernels" / file
    source = path.read_text()
    assert source.count(text) == 1, f"{file} has changed: find another place for this bug"
    path.write_text(source.replace(text, replacement))
    simulator = Simulator(kernels=tmp_path / "kernels")
    ways = [
        dataclasses.replace(simulator, order=order, late=late)
        for order in ("forward", "backward", "shuffled")
        for late in (True, False)
    ]
    ways.append(dataclasses.replace(simulator, order="shuffled", sanitizer="thread"))
    for check in CHECKS.get(file, [product]):
        assert any(_fails(check, way) for way in ways), check.__name__


@pytest.mark.slow
@pytest.mark.parametrize("check", [product, sparse_product, transform, attention])
def test_without_a_bug_nothing_is_found(check):
    for order in ("forward", "backward", "shuffled"):
        check(Simulator(order=order))


def _fails(check, simulator):
    try:
        check(simulator)
    except (AssertionError, SimulationError):
        return True
    return False
