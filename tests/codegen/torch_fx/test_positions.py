"""Modules of 16 bits: what is computed from integers alone is computed in 32 bits."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from planish.codegen.torch_fx import lower, run
from planish.codegen.torch_fx.positions import computed_from_integers
from planish.ir.shapes import infer_shapes

# Angles of positions turn x; a table that positions look up, and activations, are of 16 bits.
TEXT = """
<ir_version: 10, opset_import: ["" : 23]>
agraph (float[tokens, 4] x, int64[tokens] positions) => (float[tokens, 4] turned, float[tokens, 4] shown)
<float[4] frequencies = {1.0, 0.77, 0.1, 0.01}, int64[1] last = {1}, float[2, 4] table =
 {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8}, int64 two = {2}, float hidden = {-1e9}, float none = {0.0}>
{
    floats = Cast <to = 1> (positions)
    rows = Unsqueeze (floats, last)
    angles = Mul (rows, frequencies)
    cosines = Cos (angles)
    turned = Mul (x, cosines)
    parity = Mod (positions, two)
    looked_up = Gather <axis = 0> (table, parity)
    scaled = Mul (looked_up, frequencies)
    turned_table = Transpose (table)
    odd = Cast <to = 9> (parity)
    odd_rows = Unsqueeze (odd, last)
    bias = Where (odd_rows, hidden, none)
    shown = Add (scaled, bias)
}
"""


def model():
    found = ir.from_onnx_text(TEXT)
    infer_shapes(found)
    return found


def test_what_is_computed_from_integers():
    found = computed_from_integers(model().graph)
    assert {node.outputs[0].name for node in found} == {
        *("floats", "rows", "angles", "cosines", "parity", "odd", "odd_rows", "bias")
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_angles_are_exact_and_results_narrow(dtype):
    feeds = {"x": np.ones((3, 4), np.float32), "positions": np.array([2901, 5000, 3])}
    found = run(lower(model(), dtype=dtype), feeds)
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    angles = feeds["positions"][:, None] * np.array([1.0, 0.77, 0.1, 0.01], np.float32).astype(float)
    # One rounding to 16 bits, and an angle of float32: 5,000 to 2⁻¹¹ of one.
    bound = torch.finfo(dtype).eps / 2 + 2.0**-11
    assert np.abs(found["turned"].double().numpy() - np.cos(angles)).max() < bound
    by_table = run(lower(model(), dtype=torch.float64), feeds)["shown"]
    assert (found["shown"][1].double() - by_table[1]).abs().max() < 2 * torch.finfo(dtype).eps


def test_wider_modules_compute_all_in_their_type():
    feeds = {"x": np.ones((1, 4)), "positions": np.array([5000])}
    found = run(lower(model(), dtype=torch.float64), feeds)["turned"]
    exact = np.cos(5000 * np.array([1.0, 0.77, 0.1, 0.01], np.float32).astype(float))
    np.testing.assert_allclose(found[0], exact, rtol=0, atol=1e-12)
