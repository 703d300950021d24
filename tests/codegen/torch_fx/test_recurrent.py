"""Recurrent layers against onnxruntime."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
import pytest
from op_cases import Array, Case, Draw, Generator, agree, model_of
from planish.codegen.torch_fx import lower
from planish.ir.errors import TargetError

GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}


def layer(draw: Draw, op_type: str) -> Case:
    gates, direction = GATES[op_type], draw.choice(("forward", "reverse", "bidirectional"))
    directions = 2 if direction == "bidirectional" else 1
    steps, batch, inputs, size = draw.integers(4, 1, 4)
    state = [directions, batch, size]
    operands: list[Array | None] = [
        draw.array([steps, batch, inputs]),
        draw.array([directions, gates * size, inputs], low=-1, high=1),
        draw.array([directions, gates * size, size], low=-1, high=1),
        draw.maybe(draw.array([directions, 2 * gates * size])),
        draw.maybe(draw.array([batch], "int32", 1, steps), 0.4),
        draw.maybe(draw.array(state)),
    ]
    attributes: dict[str, Any] = {"hidden_size": size, "direction": direction, "layout": draw.maybe(0)}
    if op_type == "LSTM":
        operands += [draw.maybe(draw.array(state)), draw.maybe(draw.array([directions, 3 * size]), 0.3)]
    elif op_type == "GRU":
        attributes["linear_before_reset"] = draw.maybe(draw.integer(0, 1))
    else:
        attributes["activations"] = draw.maybe([draw.choice(("Relu", "Tanh", "Sigmoid"))] * directions)
    if direction == "forward" and draw.flag():
        del attributes["direction"]
    return Case(operands, attributes, outputs=3 if op_type == "LSTM" else 2, terms=16)


CASES: dict[str, Generator] = {op_type: functools.partial(layer, op_type=op_type) for op_type in GATES}


@pytest.mark.parametrize("op_type", CASES)
def test_op_agrees_with_onnxruntime(op_type: str) -> None:
    agree(op_type, CASES[op_type], count=40)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"layout": 1}, "attribute 'layout' is 1, and only 0 is lowered"),
        ({"input_forget": 1}, "attribute 'input_forget' is 1, and only 0 is lowered"),
        ({"clip": 3.0}, "unexpected keyword argument 'clip'"),
        ({"activation_alpha": [0.5]}, "unexpected keyword argument 'activation_alpha'"),
    ],
)
def test_what_is_not_lowered_is_refused(attributes: dict[str, Any], message: str) -> None:
    draw = Draw(0)
    case = layer(draw, "LSTM")
    case.attributes = {**case.attributes, **attributes}
    with pytest.raises(TargetError, match=rf"node 'node' \(LSTM\): .*{message}"):
        lower(ir.from_proto(model_of("LSTM", case, draw)))
