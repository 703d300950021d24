"""Norms, gates, Walsh-Hadamard transforms and quantisation of rows, on the host against float64."""

import numpy as np
import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from planish.codegen.cuda import rows
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.rows import Quantization
from planish.passes.rotate.hadamard import hadamard_matrix
from scipy.linalg import hadamard

pytestmark = needs_compiler
SIMULATOR = Simulator(order="shuffled", seed=5)


def assert_rows(found, exact, quantization):
    if quantization is None:
        if found.values.dtype != torch.float32:
            assert (found.values == exact.to(found.values.dtype)).double().mean() >= 0.999
        # A unit in the last place, and the rounding of float32 sums of terms like the largest result.
        bound = torch.finfo(found.values.dtype).eps * exact.abs() + 2e-6 * exact.abs().max()
        assert ((found.values.double() - exact).abs() <= bound).all()
        return
    levels = quantization.levels
    scales = quantization.clip * exact.abs().amax(-1) / levels
    torch.testing.assert_close(found.scales.double(), scales, rtol=1e-6, atol=0)
    ideal = (exact / scales[:, None]).round().clamp(-levels - 1, levels)
    # A number in the middle between two integers may go either way.
    assert (found.values == ideal).double().mean() >= 0.999
    assert (found.values - ideal).abs().max() <= 1


@pytest.mark.parametrize("quantization", [None, Quantization(), Quantization(levels=7, clip=0.9)], ids=str)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("none", torch.float16), ("rms", torch.bfloat16), ("layer", torch.float32)]
)
def test_norms(kind, dtype, quantization):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 328), (328,), (328,))
    )
    found = rows.normalize(SIMULATOR, x, weight, bias, kind=kind, epsilon=1e-5, quantization=quantization)
    expected = {
        "none": lambda: x.double(),
        "rms": lambda: torch.nn.functional.rms_norm(x.double(), (328,), weight.double(), 1e-5),
        "layer": lambda: torch.nn.functional.layer_norm(
            x.double(), (328,), weight.double(), bias.double(), 1e-5
        ),
    }[kind]()
    assert_rows(found, expected, quantization)
    added = bias.double() if kind == "layer" else None
    reference = rows.normalize_reference(x.double(), weight.double(), added, kind=kind, epsilon=1e-5)
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=str)
def test_swiglu(quantization):
    gate_up = torch.randn(3, 2 * 172, generator=torch.Generator().manual_seed(1)).half()
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert_rows(rows.swiglu(SIMULATOR, gate_up, quantization=quantization), expected, quantization)
    torch.testing.assert_close(rows.swiglu_reference(gate_up.double()), expected)


def test_rows_of_zeros_have_a_scale():
    found = rows.normalize(
        SIMULATOR, torch.zeros(2, 64), None, None, kind="none", epsilon=0.0, quantization=Quantization()
    )
    assert (found.values == 0).all()
    assert (found.scales == torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["stored", "quantised"])
@pytest.mark.parametrize(
    ("numbers", "factor"), [(2, 1), (64, 1), (256, 1), (4096, 1), (12 * 64, 12), (20 * 4, 20), (28 * 128, 28)]
)
def test_transforms(numbers, factor, quantization):
    """Against the whole matrix, of scipy's Sylvester factor and of one by Paley's construction."""
    sylvester = hadamard(numbers // factor)
    signs = None if factor == 1 else torch.as_tensor(np.asarray(hadamard_matrix(factor), np.float64))
    matrix = torch.as_tensor(sylvester if signs is None else np.kron(signs, sylvester)).double()
    x = torch.randn(5, numbers, generator=torch.Generator().manual_seed(numbers)).half()
    expected = x.double() @ matrix / numbers**0.5
    packed = None if signs is None else rows.packed_signs(signs)
    found = rows.transform(SIMULATOR, x, packed, scale=numbers**-0.5, quantization=quantization)
    assert_rows(found, expected, quantization)
    torch.testing.assert_close(rows.transform_reference(x.double(), signs, scale=numbers**-0.5), expected)


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.exhaustive)])
def test_sanitizers_find_nothing(sanitizer):
    simulator = Simulator(order="shuffled", sanitizer=sanitizer)
    x = torch.randn(3, 12 * 64).half()
    signs = torch.as_tensor(np.asarray(hadamard_matrix(12), np.float64))
    found = rows.transform(simulator, x, rows.packed_signs(signs), scale=1.0, quantization=Quantization())
    assert_rows(found, rows.transform_reference(x.double(), signs, scale=1.0), Quantization())


def test_reasons_not_to():
    h100 = GPUS["H100"]
    assert rows.reason_not_to(32768, torch.float16, h100) == ""
    assert "bytes of shared memory" in rows.reason_not_to(65536, torch.float16, h100)
    assert "float64" in rows.reason_not_to(64, torch.float64, h100)
    assert rows.reason_not_to_transform(28 * 128, 28, torch.float16, h100) == ""
    assert "no power of two times 28" in rows.reason_not_to_transform(28 * 12, 28, torch.float16, h100)
    assert "at most 60" in rows.reason_not_to_transform(92 * 4, 92, torch.float16, h100)
