"""What the planner chooses for the layers of a decoder, and what it predicts, beside the roofline. No GPU.

python benchmarks/cuda_plans.py          # writes results/cuda_plans.md
"""

from __future__ import annotations

from pathlib import Path

import torch
from planish.codegen.cuda import predict, sparse_w4a16, w4a16, w8a8
from planish.codegen.cuda.hardware import GPUS, Gpu
from planish.codegen.cuda.products import Plan

GROUP = 128
LAYERS = {
    "qkv": (6144, 4096),
    "output": (4096, 4096),
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "8192 × 8192": (8192, 8192),
}
"""Columns and rows of weights of Llama 3 8B, and those that kernels are compared with."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_RESULTS = Path(__file__).parent / "results" / "cuda_plans.md"


def line(name: str, n: int, k: int, m: int, gpu: Gpu) -> str:
    """One row of the table."""
    half = predict.launched(predict.by_library(m, n, k, 2, gpu.half_rate, gpu))
    sizes = {"group_size": GROUP, "shifted": False}
    plan = w4a16.plan(m, n, k, **sizes, dtype=torch.float16, bias=False, gpu=gpu)
    seconds = w4a16.predicted(plan, m, n, k, **sizes, gpu=gpu)
    least = w4a16.weight_bytes(n, k, **sizes) + 2 * m * (k + n)
    ideal = predict.roofline(least, 2.0 * m * n * k, gpu.half_rate, gpu)
    if isinstance(plan, Plan):
        tile = dict(plan.product.kernel.constants)["TILE_M"]
        chosen = f"{tile} rows" + (f", {plan.splits} parts" if plan.splits > 1 else "")
        moved = least + (8 * m * n * plan.splits if plan.splits > 1 else 0)
    else:
        chosen, moved = "dequantised", least + 4 * n * k
    others = []
    for kernel, options in ((sparse_w4a16, {"group_size": GROUP}), (w8a8, {"group_size": 0, "bits": 8})):
        other = kernel.plan(m, n, k, **options, dtype=torch.float16, bias=False, gpu=gpu)
        others.append(kernel.predicted(other, m, n, k, **options, gpu=gpu))
    return (
        f"| {name} | {m:,} | {chosen} | {moved / 1e6:,.1f} | {ideal * 1e6:,.1f} | {seconds * 1e6:,.1f} "
        f"| {ideal / seconds:.0%} | {half / seconds:.2f} | "
        + " | ".join(f"{other * 1e6:,.1f} | {half / other:.2f}" for other in others)
        + " |"
    )


def main() -> None:
    """Plan and write."""
    lines = [
        "# Plans of CUDA kernels",
        "",
        "Predicted by `planish.codegen.cuda.predict`, **not measured**: no GPU was there. W4A16, dense and "
        f"2:4-sparse, in groups of {GROUP}, float16. Roofline: bytes over bandwidth, or operations over the "
        "tensor cores' dense rate, whichever is longer. Dequantised: the weight is written out in 16 bits "
        "first, and cuBLAS multiplies. × is to float16 by cuBLAS, predicted by the same rules. Written by "
        "`benchmarks/cuda_plans.py`.",
    ]
    for gpu in (GPUS["H100"], GPUS["H200"]):
        lines += [
            "",
            f"## {gpu.name}",
            "",
            "| layer | M | chosen | MB | roofline, µs | W4A16, µs | of roofline | × | 2:4-sparse, µs | × "
            "| W8A8, µs | × |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [line(name, n, k, m, gpu) for name, (n, k) in LAYERS.items() for m in ROWS]
    _RESULTS.write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
