"""The validation of kernels on a GPU: what it does without one, and with wrong numbers."""

import os
import subprocess
import sys
import time

import pytest
import torch
from cuda_simulator import Simulator, needs_compiler
from planish.codegen.cuda import validate
from planish.codegen.cuda.checks import SMALL, Agreement
from planish.codegen.cuda.hardware import GPUS
from planish.codegen.cuda.tuning import NOTHING
from planish.ir.errors import TargetError

H100 = GPUS["H100"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    words = [sys.executable, "-m", "planish.codegen.cuda.validate", "--tune", "--shapes", "512x512"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 1
    assert "torch finds no CUDA device" in found.stderr
    assert "Traceback" not in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_numbers_are_refused(monkeypatch):
    wrong = Agreement("w4a16", "float16, 1 × 8 × 8", 1000, 0.99, 0.998)
    monkeypatch.setattr(validate, "agreements", lambda *_given: iter([wrong]))
    with pytest.raises(TargetError, match=r"w4a16 \(float16, 1 × 8 × 8\) is wrong on H100: 99.80% of its"):
        validate.numbers(Simulator(), H100, SMALL, "cpu")


@pytest.mark.slow
@needs_compiler
def test_every_kernel_is_timed():
    """On the host, whose seconds mean nothing, in tiny shapes."""
    shapes = validate.Shapes(
        weights=((64, 128),), m=(3,), row=(64, 2), tokens=(40,), heads=4, kv_heads=2, size=64
    )

    def timer(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    lines = validate.times(validate.timings(Simulator(), H100, timer, shapes, NOTHING, "cpu"))
    kernels = [line.split("`")[1] for line in lines[2:]]
    rows = ["hadamard", "hadamard to int8", "normalize to int8"]
    assert kernels == ["w4a16", "sparse_w4a16", "w8a8", *rows, *["decode_attention"] * 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_whole_validation_on_a_gpu(tmp_path):
    words = [sys.executable, "-m", "planish.codegen.cuda.validate", "--out", str(tmp_path / "table.md")]
    words += ["--tune", "--shapes", "4096x4096"]
    subprocess.run(words, check=True, env=os.environ | {"PLANISH_CACHE_DIR": str(tmp_path)})
    assert "| measured |" in (tmp_path / "table.md").read_text()
