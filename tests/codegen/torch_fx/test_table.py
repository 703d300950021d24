"""The table of lowered ops as a whole: every row is tested, and gradients are those of finite differences."""

from __future__ import annotations

import dataclasses
import runpy
import zlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from op_cases import Case, Draw, Generator, model_of
from planish.codegen.torch_fx import INPUTS_KEY, OPS, lower

TABLES = [path for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name]
CASES: dict[str, Generator] = {
    op_type: generate
    for path in TABLES
    for op_type, generate in runpy.run_path(str(path)).get("CASES", {}).items()
}
WITHOUT_GRADIENT = frozenset(
    {"And", "ArgMax", "ArgMin", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
     "ConcatFromSequence", "ConstantOfShape", "ConvInteger", "Equal", "EyeLike", "Greater",
     "GreaterOrEqual", "Hardmax", "IsInf", "IsNaN", "Less", "LessOrEqual", "MatMulInteger", "NonZero",
     "Not", "Or", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "Range", "SequenceAt",
     "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "Shape", "Size", "Xor"}
)  # fmt: skip
"""Ops whose results are integers or truths, or do not depend on numbers; those that hand sequences on."""


def test_every_row_is_tested() -> None:
    assert {("", op_type) for op_type in CASES} == OPS.keys()


@pytest.mark.parametrize("op_type", sorted(CASES.keys() - WITHOUT_GRADIENT))
def test_gradients_are_those_of_finite_differences(op_type: str) -> None:
    """Two cases for each op."""
    checked = 0
    for number in range(60):
        draw = Draw(zlib.crc32(op_type.encode()) + number, ordinary=True)
        case = CASES[op_type](draw)
        places = [place for place, operand in enumerate(case.inputs) if is_smooth(operand)]
        if places and all(is_small(operand) for operand in case.inputs) and not case.constants:
            checked += has_right_gradients(op_type, case, places, draw)
        if checked == 2:
            break
    assert checked


def is_smooth(operand: object) -> bool:
    """Whether it holds floats, none of them 0 and no two the same, where many ops have a kink."""
    if not isinstance(operand, np.ndarray) or operand.dtype.kind != "f" or not operand.size:
        return False
    return bool(operand.all()) and np.unique(operand).size == operand.size


def is_small(operand: object) -> bool:
    """And finite: there are no differences of infinities."""
    arrays = operand if isinstance(operand, list) else [] if operand is None else [operand]
    return all(array.size < 200 and np.isfinite(array.astype(np.float64)).all() for array in arrays)


def has_right_gradients(op_type: str, case: Case, places: list[int], draw: Draw) -> bool:
    """False if no result depends on the numbers."""
    model = model_of(op_type, dataclasses.replace(case, variable=range(len(case.inputs))), draw)
    module = lower(ir.from_proto(model), dtype=torch.float64)
    fixed = {
        f"x{place}": tensors(operand) for place, operand in enumerate(case.inputs) if operand is not None
    }
    names = [f"x{place}" for place in places]
    assert module.meta[INPUTS_KEY].keys() == fixed.keys()

    def smooth_results(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = module(**fixed | dict(zip(names, operands, strict=True))).values()
        flat = [item for value in found for item in (value if isinstance(value, list) else [value])]
        return tuple(item for item in flat if item.requires_grad)

    operands = [fixed[name].double().requires_grad_() for name in names]
    if not smooth_results(*operands):
        return False
    assert torch.autograd.gradcheck(smooth_results, operands, fast_mode=True)
    return True


def tensors(operand: object) -> torch.Tensor | list[torch.Tensor]:
    if isinstance(operand, list):
        return [torch.from_numpy(array) for array in operand]
    assert isinstance(operand, np.ndarray)
    tensor = torch.from_numpy(operand)
    return tensor.double() if tensor.is_floating_point() else tensor
