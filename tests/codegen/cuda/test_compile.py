"""Every kernel compiles for every architecture, without a spill; what is compiled is kept."""

import pytest
import torch
from planish.codegen.cuda import compile as compiling
from planish.codegen.cuda import rows, w4a16, w8a8
from planish.codegen.cuda.compile import compiled, resources
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.kernel import Kernel
from planish.codegen.cuda.rows import Quantization
from planish.ir.errors import TargetError

pytest.importorskip("cuda.core")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a")
H100 = GPUS["H100"]


class Recorder:
    """Notes what would be launched."""

    def __init__(self):
        self.kernels = []

    def launch(self, launch, _arguments):
        self.kernels.append(launch.kernel)


def products():
    """Tiles for few and many rows, with all that a weight may have besides."""
    found = []
    for m in (1, 32, 512):
        for options in ({"group_size": 0, "shifted": False}, {"group_size": 32, "shifted": True}):
            plan = w4a16.plan(m, 512, 4096, dtype=torch.bfloat16, bias=True, gpu=H100, **options)
            found += [plan.product.kernel] + ([] if plan.addition is None else [plan.addition.kernel])
        for bits, group_size in ((8, 0), (4, 64)):
            options = {"group_size": group_size, "bits": bits, "dtype": torch.float16, "bias": True}
            found.append(w8a8.plan(m, 512, 4096, gpu=H100, **options).kernel)
    return found


def row_kernels():
    recorder, x = Recorder(), torch.zeros(1, 4096, dtype=torch.float16)
    for quantization in (None, Quantization()):
        rows.normalize(recorder, x, x[0], x[0], kind="layer", epsilon=1e-5, quantization=quantization)
        rows.swiglu(recorder, x, quantization=quantization)
        rows.transform(recorder, x, None, scale=1.0, quantization=quantization)
        rows.transform(
            recorder,
            x[:, : 28 * 128],
            torch.zeros(28, dtype=torch.int64),
            scale=1.0,
            quantization=quantization,
        )
    return recorder.kernels


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    for kernel in dict.fromkeys(products() + row_kernels()):
        found = compiled(kernel, architecture)
        assert found.resources.spilled_bytes == 0, str(kernel)
        assert found.resources.stack_bytes == 0, str(kernel)
        assert found.cubin[:4] == b"\x7fELF"


def test_what_is_compiled_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    kernel = Kernel("add_parts", (("ELEMENT", "Half"), ("BIAS", 0)))
    first = compiled(kernel, "sm_80")
    with monkeypatch.context() as patched:
        patched.setattr(compiling, "_compile", None)
        assert compiled(kernel, "sm_80") == first
    for log in tmp_path.glob("cubins/*.log"):
        log.write_text("nothing")
    assert compiled(kernel, "sm_80") == first  # compiled again


def test_what_does_not_compile_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        TargetError, match=r"add_parts<ELEMENT=Quarter, BIAS=0> does not compile for sm_80: .*Quarter"
    ):
        compiled(Kernel("add_parts", (("ELEMENT", "Quarter"), ("BIAS", 0))), "sm_80")
    assert not list(tmp_path.glob("**/*.cubin"))


def test_a_log_without_figures():
    with pytest.raises(TargetError, match="does not say what it takes"):
        resources("ptxas info: nothing", Kernel("add_parts"))
