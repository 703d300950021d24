"""How close our CUDA kernels come to float64, on the tests' host simulator. Needs g++, and no GPU.

Each case is run twice: with asynchronous copies that land at once and in order, and with copies that land as
late as they may while threads take turns at random. On a GPU, `python -m planish.codegen.cuda.validate` does
the same with larger cases.

    python benchmarks/cuda_numbers.py            # writes results/cuda_numbers.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from planish.codegen.cuda import w4a16, w8a8
from planish.codegen.cuda.checks import SMALL, Agreement, agreements
from planish.codegen.cuda.hardware import GPUS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from cuda_simulator import Simulator

_RESULTS = Path(__file__).parent / "results" / "cuda_numbers.md"


def round_trips() -> list[str]:
    """How many random weights come out of packing as they went in."""
    equal = {"w4a16": 0, "w8a8": 0}
    generator = torch.Generator().manual_seed(0)
    count = 50
    for _ in range(count):
        k, n = (int(torch.randint(1, 400, (), generator=generator)) for _ in range(2))
        integers = torch.randint(0, 16, (k, n), generator=generator, dtype=torch.uint8)
        found = w4a16.unpack(w4a16.pack(integers, torch.ones(1, n), None, 0))
        equal["w4a16"] += torch.equal(found[0], integers)
        bits = 4 if k % 2 else 8
        half = 1 << (bits - 1)
        signed = torch.randint(-half, half, (k, n), generator=generator, dtype=torch.int8)
        packed = w8a8.pack(signed, torch.ones(1, n), group_size=0, bits=bits)
        equal["w8a8"] += torch.equal(w8a8.unpack(packed), signed)
    return [f"{name}: {found} of {count}" for name, found in equal.items()]


def main() -> None:
    """Run and write."""
    gpu = GPUS["H100"]
    first = list(agreements(Simulator(order="forward", late=False), gpu, SMALL))
    second = list(agreements(Simulator(order="shuffled", late=True, seed=1), gpu, SMALL))
    lines = [
        "# Numbers of CUDA kernels",
        "",
        "On the host simulator, against float64. Rounded: outputs that are the float64 result rounded to "
        "their type; within: those that are the rounding of a number that is at most one unit in the last "
        "place of float32, at the sum of the magnitudes of all terms, away from it. The worse of two "
        "schedules (in order and copies at once; at random and copies late). Plans are for an H100. Random "
        "weights that packing gives back exactly: "
        f"{'; '.join(round_trips())}. Written by `benchmarks/cuda_numbers.py`.",
        "",
        "| kernel | case | outputs | rounded | within |",
        "|---|---|---|---|---|",
    ]
    lines += [_line(one, other) for one, other in zip(first, second, strict=True)]
    worst = min(min(one.within for one in first), min(one.within for one in second))
    lines += ["", f"Least share within: {worst:.3%} of the outputs of a case.", ""]
    _RESULTS.write_text("\n".join(lines))
    print("\n".join(lines))


def _line(one: Agreement, other: Agreement) -> str:
    rounded, within = min(one.rounded, other.rounded), min(one.within, other.within)
    return f"| `{one.kernel}` | {one.case} | {one.outputs:,} | {rounded:.2%} | {within:.2%} |"


if __name__ == "__main__":
    main()
