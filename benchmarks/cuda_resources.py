"""What our CUDA kernels take of each architecture: registers, spills, shared memory. Needs no GPU.

python benchmarks/cuda_resources.py          # writes results/cuda_resources.md
"""

from __future__ import annotations

from pathlib import Path

from planish.codegen.cuda.compile import compiled, compiler_version
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.variants import ARCHITECTURES, variants

_RESULTS = Path(__file__).parent / "results" / "cuda_resources.md"


def main() -> None:
    """Compile and write."""
    spills = 0
    lines = [
        "# Resources of CUDA kernels",
        "",
        f"Compiled by NVRTC {compiler_version()}; registers of a thread, and spilled bytes where there "
        "are any. All that plans choose from for an H100, a weight of 4,096 × 4,096, and a "
        "cache of 8 heads and 8,192 tokens. Written by `benchmarks/cuda_resources.py`; nothing was run on a "
        "GPU.",
        "",
        f"| kernel | threads | shared KB | {' | '.join(ARCHITECTURES)} |",
        "|---|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    for launch in variants(GPUS["H100"]):
        cells = []
        for architecture in ARCHITECTURES:
            found = compiled(launch.kernel, architecture).resources
            spills += found.spilled_bytes + found.stack_bytes
            spilled = f" ({found.spilled_bytes} spilled)" if found.spilled_bytes else ""
            cells.append(f"{found.registers}{spilled}")
        constants = ", ".join(f"{name}={value}" for name, value in launch.kernel.constants)
        lines.append(
            f"| `{launch.kernel.name}` {constants} | {launch.threads} | {launch.shared_bytes / 1024:.1f} "
            f"| {' | '.join(cells)} |"
        )
        print(lines[-1], flush=True)
    _RESULTS.write_text("\n".join([*lines, ""]))
    if spills:
        raise SystemExit("a kernel spills")


if __name__ == "__main__":
    main()
