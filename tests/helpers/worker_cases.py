"""Work whose result must not depend on who does it."""

import numpy as np
import planish
from planish.ir import clone
from planish.passes.quantize.algorithms import LayerStatistics, algorithm
from planish.passes.quantize.grid import Grid
from small_decoders import VOCABULARY, traced_llama

RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((300, 64))
WEIGHT = RNG.standard_normal((64, 700)).astype(np.float32)
STATISTICS = LayerStatistics(ROWS.T @ ROWS / 300, (ROWS.T @ ROWS / 3000)[::-1], 300)


def solved(name, hands, **grid):
    settings = {"bits": 3, "symmetric": False, "block_size": 16, "clip": True, **grid}
    run = algorithm(name, act_order=True, damp=0.01)
    found = run(WEIGHT, Grid(scale_dtype=np.dtype(np.float16), **settings), STATISTICS, print, hands)
    parts = [found.integers, found.scale, found.zero_point]
    parts += [] if found.outliers is None else [found.outliers.positions, found.outliers.values]
    return [None if part is None else (part.dtype, part.shape, part.tobytes()) for part in parts]


ALGORITHMS = ["rtn", "gptq", "gptaq", "awq-clip", "spqr"]


PASSES = {
    "gptq": "canonicalize,fuse,"
    "quantize{scheme=W4A16,group_size=16,algorithm=gptq,compensate_rank=2,ignore=[]}",
    "nearest": "canonicalize,fuse,quantize{scheme=W8A8,ignore=[]}",
    "allocate": "canonicalize,allocate{candidates=[W2A16,W4A16,W8A16],group_size=16,bits_per_weight=5},"
    "scale{method=awq,group_size=16},quantize{scheme=W4A16,group_size=16,ignore=[]}",
    "prune": "canonicalize,prune{sparsity=0.4,evaluations=10,samples=2,multiple=4}",
}


def compiled(passes, workers, folder):
    ids = np.random.default_rng(0).integers(1, VOCABULARY, (4, 16))
    data = [{"input_ids": row[None]} for row in ids]
    found = planish.compile(
        clone(traced_llama()), passes, calibration=data, target="portable", workers=workers
    )
    found.save(folder / "out.onnx")
    return (folder / "out.onnx").read_bytes()
