"""Every kernel compiles for every architecture, without a spill; what is compiled is kept."""

import pytest
from planish.codegen.cuda import compile as compiling
from planish.codegen.cuda.compile import compiled, resources
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.kernel import Kernel
from planish.codegen.cuda.variants import ARCHITECTURES, variants
from planish.ir.errors import TargetError

pytest.importorskip("cuda.core")


@pytest.mark.slow
@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(turn, id=name, marks=[pytest.mark.exhaustive] if turn else [])
        for turn, name in enumerate(ARCHITECTURES)
    ],
)
def test_nothing_spills(turn, tmp_path, monkeypatch):
    """Every other variant, on one architecture in turn; `benchmarks/cuda_resources.py` has all on all."""
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    architecture = ARCHITECTURES[turn]
    for launch in variants(GPUS["H100"])[turn :: 2 * len(ARCHITECTURES)]:
        found = compiled(launch.kernel, architecture)
        assert found.resources.spilled_bytes == 0, str(launch.kernel)
        assert found.resources.stack_bytes == 0, str(launch.kernel)
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
    with pytest.raises(TargetError, match=r"(?s)BIAS=0> does not compile for sm_80: .*undefined"):
        compiled(Kernel("add_parts", (("ELEMENT", "Quarter"), ("BIAS", 0))), "sm_80")
    assert not list(tmp_path.glob("**/*.cubin"))


def test_a_log_without_figures():
    with pytest.raises(TargetError, match="does not say what it takes"):
        resources("ptxas info: nothing", Kernel("add_parts"))
