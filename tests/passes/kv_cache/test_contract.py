"""Passes about caches under a contract check: which outputs they redefine; the others are compared."""

import numpy as np
import planish
import pytest
from planish.ir import clone
from small_decoders import VOCABULARY, traced_llama

IDS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12))
PIPELINES = (
    "center-cache",
    "fuse,kv-cache",
    "fuse,raise-cache,kv-cache{bits=4}",
    "fuse,evict{sinks=1,recent=1,keep=0.7}",
    "fuse,evict{policy=recent,renumber=true}",
    "fuse,window{tokens=4}",
    "group-queries",
    "last-logits",
    "rotate{rotations=[R2,R3]}",
    "drop-blocks{count=1,protect=[],neighbours=5}",
    "two-stage{sparsity=0.5,samples=2}",
)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("past", [0, 3])
def test_the_contract_is_checked_behind_a_past(pipeline: str, past: int):
    model = clone(traced_llama())
    caches = [value for value in model.graph.inputs if str(value.name).startswith("past_key_values")]
    feeds = {
        "input_ids": IDS[:, past:],
        "attention_mask": np.ones_like(IDS),
        "position_ids": np.broadcast_to(np.arange(past, 12), (2, 12 - past)),
    }
    rng = np.random.default_rng(1)
    for value in caches:
        feeds[str(value.name)] = rng.standard_normal((2, value.shape[1], past, value.shape[3])).astype(
            np.float32
        )
    inputs = {str(value.name) for value in model.graph.inputs}
    compiled = planish.compile(
        model,
        f"canonicalize,{pipeline}",
        target="portable",
        example_inputs={name: array for name, array in feeds.items() if name in inputs},
        calibration=[{"input_ids": IDS}],
        check="contract",
    )
    assert compiled.report.passes[-1].modified
