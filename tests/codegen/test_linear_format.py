"""What a target says of a scheme before any work."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from planish.codegen import LinearFormat, get_target

BOTH = pytest.mark.parametrize("target", ["portable", "onnxruntime-cpu"])


@BOTH
@pytest.mark.parametrize(
    "linear",
    [
        LinearFormat(bits=4, block_size=32),
        LinearFormat(bits=2),
        LinearFormat(bits=8, activation_bits=8, activations="tensor"),
        LinearFormat(bits=4, activation_bits=8, activations="static"),
        LinearFormat(bits=4, activation_bits=4, block_size=128),
        LinearFormat(kind="codebook", bits=4, block_size=64, dtype=ir.DataType.FLOAT16),
        LinearFormat(kind="float8", bits=8),
    ],
    ids=str,
)
def test_schemes_that_run(target, linear):
    assert get_target(target).unsupported_reason(linear) is None


@BOTH
@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (LinearFormat(bits=1), "no container"),
        (LinearFormat(bits=9), "no container"),
        (LinearFormat(kind="float8", bits=4), "8 bits, not 4"),
        (LinearFormat(bits=8, activation_bits=12), "activations of 12 bits"),
        (LinearFormat(kind="codebook", bits=4, activation_bits=8), "float activations only"),
        (LinearFormat(bits=8, activation_bits=8, activations="static", block_size=32), "found groups"),
        (LinearFormat(bits=8, activation_bits=4, activations="static"), "8 bits, not 4"),
        (LinearFormat(bits=4, activation_bits=8, activations="tensor"), "5 to 8 bits, not 4"),
    ],
)
def test_schemes_that_do_not(target, linear, reason):
    assert reason in get_target(target).unsupported_reason(linear)


def test_bfloat16_is_for_other_runtimes():
    linear = LinearFormat(bits=4, block_size=32, dtype=ir.DataType.BFLOAT16)
    assert "bfloat16" in get_target("onnxruntime-cpu").unsupported_reason(linear)
    assert get_target("portable").unsupported_reason(linear) is None


@BOTH
def test_what_runs_is_told(target):
    text = " ".join(get_target(target).formats())
    for name in ("W2A16", "W8A8", "NF4", "MXFP4", "FP8", "static"):
        assert name in text
