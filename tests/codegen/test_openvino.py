"""Portable files give the same numbers in OpenVINO."""

import numpy as np
import planish
import pytest
from planish.runtime.calibration.data import completed
from planish.runtime.reference import run_model
from small_decoders import traced_llama

openvino = pytest.importorskip("openvino")
IDS = np.random.default_rng(0).integers(0, 64, (2, 12))


@pytest.mark.parametrize(
    "passes",
    [
        "canonicalize,fuse",
        "canonicalize,fuse,quantize{scheme=W8A16,algorithm=rtn}",
        "canonicalize,fuse,quantize{scheme=W4A16_ASYM,group_size=16,algorithm=rtn},kv-cache{bits=8}",
        "canonicalize,fuse,quantize{scheme=W8A8,algorithm=rtn},kv-cache{bits=4}",
        "canonicalize,fuse,quantize{scheme=W8A8,activations=token,algorithm=rtn}",
        "canonicalize,fuse,quantize{scheme=NF4,group_size=32,algorithm=rtn}",
    ],
)
def test_a_decoder_has_the_same_logits(passes, tmp_path):
    compiled = planish.compile(traced_llama(), passes, target="portable", calibration=[{"input_ids": IDS}])
    feeds = completed({"input_ids": IDS}, compiled.bound.model)
    file = compiled.save(tmp_path / "llama.onnx")
    hints = {"EXECUTION_MODE_HINT": "ACCURACY"}
    found = openvino.Core().compile_model(file, "CPU", hints)(feeds)["logits"]
    expected = run_model(compiled.bound.model, feeds)["logits"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
