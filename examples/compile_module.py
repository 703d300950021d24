"""Compile a torch module to int8, check it against the original, and write an ONNX file."""

from __future__ import annotations

import planish
import rich
import torch


def main() -> None:
    """Compile, compare, save."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.LayerNorm(1024), torch.nn.Linear(1024, 256)
    ).eval()
    x = torch.randn(8, 256)

    # check="contract": after each pass the model is run on x; an exact pass that is not exact stops here.
    compiled = planish.compile(
        module, "canonicalize,fuse,quantize{scheme=W8A8}", example_inputs=x, check="contract"
    )
    rich.print(compiled.report)
    for binding in compiled.bound.bindings:
        print(f"{binding.node}: {binding.kernel} ({binding.reason})")

    y, reference = compiled(x), module(x)
    print(f"cosine to the module: {torch.nn.functional.cosine_similarity(y, reference).mean():.4f}")
    print(f"written: {compiled.save('module-int8.onnx')}")


if __name__ == "__main__":
    main()
