"""Rounding a few columns at a time gives what rounding the whole weight gives."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from planish.ir.errors import PassError
from planish.ir.rearranged import JoinedTensor
from planish.passes.quantize import streamed
from planish.passes.quantize.algorithms.rtn import round_to_nearest
from planish.passes.quantize.grid import Grid
from planish.passes.quantize.scheme import parse_scheme


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch):
    monkeypatch.setattr(streamed, "_NUMBERS_AT_ONCE", 80)


def value(weight, transposed):
    return ir.val("w", const_value=ir.Tensor(np.ascontiguousarray(weight.T) if transposed else weight))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "symmetric": True, "block_size": 32, "clip": True},
        {"bits": 4, "symmetric": False, "block_size": 16, "clip": True},
        {"bits": 8, "symmetric": True, "block_size": 0, "limit_pairs": True},
        {"bits": 2, "symmetric": False, "block_size": 0, "clip": True},
    ],
)
def test_the_parts_are_the_whole(dtype, transposed, options):
    weight = np.random.default_rng(0).standard_normal((64, 97)).astype(dtype)
    grid = Grid(scale_dtype=np.dtype(np.float16), **options)
    found, error = streamed.round_weight(value(weight, transposed), grid, transposed=transposed)
    wide = weight.astype(np.float32)
    expected = round_to_nearest(wide, grid)
    np.testing.assert_array_equal(found.integers, expected.integers)
    np.testing.assert_array_equal(found.scale, expected.scale)
    if expected.zero_point is not None:
        np.testing.assert_array_equal(found.zero_point, expected.zero_point)
    assert found.bits == expected.bits
    exact = np.linalg.norm(wide - expected.dequantized()) / np.linalg.norm(wide)
    assert error == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_joined_weights_are_rounded_one_after_the_other(transposed, across, monkeypatch):
    """Read as a whole, which copies them, only where they are joined along the rows of each column."""
    weight = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float16)
    grid = Grid(bits=4, symmetric=False, block_size=32, scale_dtype=np.dtype(np.float16))
    expected, error = streamed.round_weight(value(weight, transposed), grid, transposed=transposed)
    parts = np.split(weight, [32], axis=0) if across else np.split(weight, [7, 30], axis=1)
    axis = 0 if across else 1
    stored = [ir.Tensor(np.ascontiguousarray(part.T) if transposed else part) for part in parts]
    joined, whole = JoinedTensor(stored, axis=1 - axis if transposed else axis), JoinedTensor.numpy
    wholes = []
    monkeypatch.setattr(JoinedTensor, "numpy", lambda tensor: wholes.append(tensor) or whole(tensor))
    found, found_error = streamed.round_weight(ir.val("w", const_value=joined), grid, transposed=transposed)
    np.testing.assert_array_equal(found.integers, expected.integers)
    np.testing.assert_array_equal(found.scale, expected.scale)
    np.testing.assert_array_equal(found.zero_point, expected.zero_point)
    assert found_error == pytest.approx(error, rel=1e-5)
    assert bool(wholes) == across


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scheme", ["W4A16", "W3A16", "NF4", "MXFP4", "FP8"])
def test_the_error_alone_is_that_of_the_whole(dtype, scheme):
    weight = np.random.default_rng(0).standard_normal((64, 97)).astype(dtype)
    grid = parse_scheme(scheme, 32 if scheme.startswith("W") else None).grid(
        ir.DataType.FLOAT, clip=False, limit_pairs=False
    )
    wide = weight.astype(np.float32)
    exact = np.linalg.norm(wide - round_to_nearest(wide, grid).dequantized()) / np.linalg.norm(wide)
    assert streamed.rounding_error(weight, grid) == pytest.approx(exact, rel=1e-5)
    assert streamed.rounding_error(np.zeros((64, 97), dtype), grid) == 0


def test_zeros_have_no_error():
    grid = Grid(bits=4, symmetric=True, block_size=0, scale_dtype=np.dtype(np.float32))
    found, error = streamed.round_weight(value(np.zeros((8, 4), np.float32), False), grid)
    assert error == 0
    assert not found.integers.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad):
    weight = np.zeros((8, 300), np.float16)
    weight[3, 299] = bad
    grid = Grid(bits=4, symmetric=True, block_size=0, scale_dtype=np.dtype(np.float32))
    with pytest.raises(PassError, match="weight 'w' holds NaN or infinity"):
        streamed.round_weight(value(weight, False), grid)
    with pytest.raises(PassError, match="weight 'w' is not constant"):
        streamed.round_weight(ir.val("w"), grid)
