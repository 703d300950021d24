"""A small Llama before its cache is rewritten, and data to calibrate it on."""

import numpy as np
import planish
import pytest
from planish.ir import clone
from planish.runtime.calibration import CalibrationData
from small_decoders import VOCABULARY, small_decoder, traced_llama


@pytest.fixture(autouse=True)
def _no_warnings_of_onnx_ir(caplog):
    """Its log is what a user would see, such as values whose shape is known and type is not."""
    yield
    records = [*caplog.get_records("setup"), *caplog.get_records("call")]
    assert not [record.getMessage() for record in records if record.name.startswith("onnx_ir")]


@pytest.fixture(scope="module")
def module():
    return small_decoder()


@pytest.fixture(scope="module")
def canonical():
    return planish.compile(clone(traced_llama()), "canonicalize", target="portable").model


@pytest.fixture(scope="module")
def fused(canonical):
    return planish.compile(clone(canonical), "fuse", target="portable").model


@pytest.fixture
def model(fused):
    return clone(fused)


@pytest.fixture(scope="module")
def calibration(fused):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (32, 24))
    return CalibrationData.read([{"input_ids": ids}], fused)
