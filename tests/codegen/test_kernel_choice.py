"""How onnxruntime-cpu chooses a kernel: measurements, what they decide, and their cache."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from planish.codegen import get_target, microbenchmark
from planish.codegen.linear_op import LinearSpec, made_up_op
from planish.codegen.machine import cache_directory
from planish.codegen.microbenchmark import Measurement, Microbenchmark
from planish.codegen.onnxruntime_cpu import kernel as kernel_module
from planish.codegen.onnxruntime_cpu.float_weights import FLOAT_KERNEL
from planish.codegen.onnxruntime_cpu.kernel import Chooser
from planish.codegen.onnxruntime_cpu.linear_kernels import LINEAR_BODY, LINEAR_KERNELS
from planish.ir.errors import TargetError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(microbenchmark, "_SECONDS_PER_CANDIDATE", 0.0)
    monkeypatch.setattr(microbenchmark, "_FEWEST_ROUNDS", 1)


def spec_of(dtype="FLOAT"):
    """Weights of 4 bits in blocks of 32, float activations."""
    return LinearSpec("float", 64, 12, 4, 32, True, False, True, dtype, 3, pairs_fit=True)


class Scripted:
    """A microbenchmark whose answers are given: seconds and error by kernel, for each number of rows."""

    def __init__(self, by_rows):
        self.by_rows = by_rows

    def measure(self, subject, candidates, body, feeds, check_feeds):
        return {name: Measurement(*self.by_rows[subject["rows"]][name]) for name in candidates}


def choose(by_rows, rows, max_error=1e-2):
    return Chooser(Scripted(by_rows), rows, max_error).choose(
        made_up_op(spec_of()), LINEAR_KERNELS, LINEAR_BODY, FLOAT_KERNEL
    )


NBITS = {
    1: {"MatMulNBits accuracy 4": (1, 5e-3), "MatMulNBits accuracy 0": (2, 1e-7), FLOAT_KERNEL: (3, 1e-7)},
    128: {
        "MatMulNBits accuracy 4": (60, 5e-3),
        "MatMulNBits accuracy 0": (70, 1e-7),
        FLOAT_KERNEL: (30, 1e-7),
    },
}


@pytest.mark.parametrize(
    ("rows", "kernel"),
    [((1,), "MatMulNBits accuracy 4"), ((128,), FLOAT_KERNEL), ((1, 128), "MatMulNBits accuracy 4")],
)
def test_the_choice_depends_on_the_rows(rows, kernel):
    assert choose(NBITS, rows).kernel.name == kernel


def test_the_reason_says_that_nothing_beats_float():
    choice = choose(NBITS, (128,))
    assert choice.reason.startswith("no other kernel beats it at 128 rows: the next, MatMulNBits accuracy 4")
    assert "2.00 × as long" in choice.reason


def test_a_kernel_with_too_large_an_error_is_not_used_and_said():
    choice = choose(NBITS, (1,), max_error=1e-3)
    assert choice.kernel.name == "MatMulNBits accuracy 0"
    assert choice.reason.startswith(f"0.67 × the time of {FLOAT_KERNEL} at 1 rows")
    assert "MatMulNBits accuracy 4 is faster, but its error on this machine is 5.0e-03" in choice.reason


def test_between_equals_the_exact_kernel_is_taken():
    rows = {1: NBITS[1] | {FLOAT_KERNEL: (1.04, 1e-7)}}
    assert choose(rows, (1,)).kernel.name == FLOAT_KERNEL


def test_in_float16_the_kernel_with_the_least_error_counts_as_exact():
    rounded = {name: (1.0, 5e-3 if name == "MatMulNBits accuracy 4" else 4e-4) for name in NBITS[1]}
    choice = choose({1: rounded | {"MatMulNBits accuracy 4": (0.99, 5e-3)}}, (1,))
    assert choice.kernel.name != "MatMulNBits accuracy 4"


def test_bfloat16_has_no_kernel_and_says_so():
    target = get_target("onnxruntime-cpu", rows=(1,))
    op = made_up_op(spec_of("BFLOAT16"))
    with pytest.raises(TargetError, match="NOT_IMPLEMENTED"):
        target._chooser().choose(op, LINEAR_KERNELS, LINEAR_BODY, FLOAT_KERNEL)


def test_a_refused_kernel_is_told_with_what_onnxruntime_said():
    refused = {1: NBITS[1] | {"MatMulNBits accuracy 4": (math.inf, math.inf, "no such op")}}
    choice = choose(refused, (1,))
    assert choice.kernel.name == "MatMulNBits accuracy 0"
    assert "onnxruntime refuses MatMulNBits accuracy 4: no such op" in choice.reason


def test_no_kernel_left_is_an_error():
    with pytest.raises(TargetError, match=r"no kernel runs QuantizedLinear .* within an error of 1e-09"):
        choose(NBITS, (1,), max_error=1e-9)


def measure_counting(benchmark=None):
    built = []
    op = made_up_op(spec_of())

    def build(kernel):
        built.append(kernel.name)
        return kernel_module._candidate(op, kernel)

    kernels = [kernel for kernel in LINEAR_KERNELS if kernel.applies(op)]
    result = (benchmark or Microbenchmark()).measure(
        {"op": "test"},
        {kernel.name: lambda kernel=kernel: build(kernel) for kernel in kernels},
        lambda: kernel_module._candidate(op, LINEAR_BODY).model,
        lambda: op.feeds(2),
        lambda: op.feeds(2),
    )
    return result, built


def entries():
    return list((cache_directory() / "microbenchmarks").iterdir())


def test_a_measurement_is_made_once():
    first, built = measure_counting()
    again, rebuilt = measure_counting()
    assert built
    assert not rebuilt
    assert again == first
    assert [path.suffix for path in entries()] == [".json"]


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"key": {}, "measurements": {}}'])
def test_a_damaged_entry_is_measured_again(damage):
    measure_counting()
    (path,) = entries()
    path.write_text(damage)
    _, rebuilt = measure_counting()
    assert rebuilt
    assert json.loads(path.read_text())["measurements"]


def test_another_number_of_threads_is_another_entry():
    measure_counting(Microbenchmark(1))
    _, built = measure_counting(Microbenchmark(2))
    assert built
    assert len(entries()) == 2


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path / "file"))
    result, _ = measure_counting()
    assert result


def test_a_refusal_of_onnxruntime_is_a_measurement():
    op = made_up_op(spec_of())
    unknown = dataclasses.replace(
        LINEAR_KERNELS[0], emit=lambda build, op: build.op("NoSuchOp", op.x, domain="com.microsoft")
    )
    result = Microbenchmark().measure(
        {"op": "refused"},
        {"unknown": lambda: kernel_module._candidate(op, unknown)},
        lambda: kernel_module._candidate(op, LINEAR_BODY).model,
        lambda: op.feeds(2),
        lambda: op.feeds(2),
    )
    assert math.isinf(result["unknown"].seconds)
    assert "NoSuchOp" in result["unknown"].refusal
