"""What a student is compared with: outputs, hidden states, labels; and which weights training may change."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from planish.ir.errors import InputError
from planish.ir.shapes import infer_shapes
from planish.runtime.training import Losses, Objective, Weight, float_weights
from planish.runtime.training.losses import divergence, relative_error

WIDTH, CLASSES = 4, 6
ATTENTION = (
    "a = Attention <is_causal = 1, q_num_heads = 1, kv_num_heads = 1> (x, x, x)"
    " o = MatMul (a, o.weight) y = Add (x, o)"
)
MLP = "u = MatMul (y, up.weight) g = Relu (u) d = MatMul (g, down.weight) z = Add (y, d)"
WEIGHTS = {
    "embed.weight": (CLASSES, WIDTH),
    "o.weight": (WIDTH, WIDTH),
    "up.weight": (WIDTH, 8),
    "down.weight": (8, WIDTH),
    "lm_head.weight": (WIDTH, CLASSES),
}


def model_of(body, output=f"float[b, s, {CLASSES}] logits", weights=WEIGHTS, inputs="int64[b, s] input_ids"):
    for name in weights:
        body = body.replace(name, f'"{name}"')
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["": 23]> net ({inputs}) => ({output}) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def decoder(*, attention=ATTENTION, mlp=MLP, output="logits", embed="x = Gather (embed.weight, input_ids)"):
    body = f"{embed} {attention} {mlp} {output} = MatMul (z, lm_head.weight)"
    used = {name: shape for name, shape in WEIGHTS.items() if name in body}
    return model_of(body, f"float[b, s, {CLASSES}] {output}", used)


IDS = np.array([[1, 2, 3], [4, 5, 0]])
FEEDS = {"input_ids": IDS}
ALL = Losses(logits=0.5, hidden=2.0, squarehead=3.0, task=1.5, temperature=2.0)


def tensors(seed):
    rng = np.random.default_rng(seed)
    shapes = {"y": WIDTH, "z": WIDTH, "logits": CLASSES}
    return {name: torch.from_numpy(rng.standard_normal((2, 3, size))) for name, size in shapes.items()}


def test_all_losses_with_their_weights():
    objective = Objective(decoder(), decoder(), ALL, [FEEDS])
    assert objective.outputs == ("logits",)
    assert objective.states == ("y", "z")
    student, teacher = tensors(0), tensors(1)
    found = objective(student, teacher, FEEDS)
    differences = {name: (student[name] - teacher[name]).numpy() ** 2 for name in ("y", "z")}
    logits, targets = student["logits"][:, :-1].reshape(-1, CLASSES), IDS[:, 1:].reshape(-1)
    chosen = torch.log_softmax(logits, -1).numpy()[range(4), targets]
    expected = {
        "logits": 0.5
        * divergence(*(each["logits"].reshape(6, -1) for each in (student, teacher)), 2.0).item(),
        "hidden": 2.0 * sum(each.sum(-1).mean() for each in differences.values()),
        "squarehead": 3.0
        * np.mean([differences[name].sum() / (teacher[name].numpy() ** 2).sum() for name in differences]),
        "task": -1.5 * chosen.mean(),
    }
    assert {name: loss.item() for name, loss in found.items()} == pytest.approx(expected)


def test_padding_does_not_count():
    mask = np.array([[1, 0, 0], [1, 1, 1]])
    objective = Objective(decoder(), decoder(), ALL, [FEEDS])
    student, teacher = tensors(0), tensors(1)
    noisy = {name: tensor.clone() for name, tensor in student.items()}
    for tensor in noisy.values():
        tensor[0, 1:] *= -100
    feeds = FEEDS | {"attention_mask": mask}
    losses = [objective(each, teacher, feeds) for each in (student, noisy)]
    assert losses[0].keys() == {"logits", "hidden", "squarehead", "task"}
    for name in losses[0]:
        torch.testing.assert_close(losses[0][name], losses[1][name])
        assert abs(objective(noisy, teacher, FEEDS)[name] - losses[0][name]) > 1


def test_dropped_blocks_and_other_widths_have_no_hidden_state():
    dropped = decoder(mlp=MLP.replace("(y,", "(x,"), attention="")
    assert Objective(dropped, decoder(), ALL, [FEEDS]).states == ("z",)
    narrow = model_of(
        "x = Gather (e.weight, input_ids) u = MatMul (x, up.weight) d = MatMul (u, down.weight)"
        " y = Add (x, d) logits = MatMul (y, head.weight)",
        weights={"e.weight": (6, 2), "up.weight": (2, 8), "down.weight": (8, 2), "head.weight": (2, CLASSES)},
    )
    assert Objective(narrow, decoder(), Losses(), [FEEDS]).states == ()


def test_outputs_by_name_by_labels_and_by_order():
    student = {name: torch.rand(2, 3, CLASSES, dtype=torch.float64) for name in ("scores", "y", "z")}
    teacher = {name: torch.rand(2, 3, CLASSES, dtype=torch.float64) for name in ("scores", "y", "z")}
    pair = [each["scores"].reshape(6, -1) for each in (student, teacher)]
    model = decoder(output="scores")
    labels = np.zeros((2, 3), np.int64)
    for losses, feeds, expected in (
        (Losses(squarehead=0), FEEDS, relative_error),
        (Losses(squarehead=0), FEEDS | {"labels": labels}, divergence),
        (Losses(squarehead=0), FEEDS | {"labels": labels.astype(np.float32)}, relative_error),
        (Losses(squarehead=0, outputs="logits"), FEEDS, divergence),
        (Losses(squarehead=0, outputs="features"), FEEDS | {"labels": labels}, relative_error),
    ):
        found = Objective(model, model, losses, [feeds])(student, teacher, feeds)
        torch.testing.assert_close(found["logits"], expected(*pair))


def test_caches_and_integers_are_no_outputs():
    body = 'h = MatMul (x, w) "present.0.key" = Relu (h) c = Shape (h)'
    model = model_of(
        body, 'float[b, 4] h, float[b, 4] "present.0.key", int64[2] c', {"w": (4, 4)}, "float[b, 4] x"
    )
    assert Objective(model, model, Losses(squarehead=0), [{}]).outputs == ("h",)


def test_outputs_of_different_shapes_are_refused():
    """A student whose last token's logits are left has nothing to be compared in."""
    objective = Objective(decoder(), decoder(), ALL, [FEEDS])
    student = tensors(0) | {"logits": tensors(0)["logits"][:, -1:]}
    with pytest.raises(InputError, match=r"'logits' is \[2, 1, 6\], and the original's \[2, 3, 6\]"):
        objective(student, tensors(1), FEEDS)


def test_losses_without_anything_to_work_on():
    plain = model_of("h = MatMul (x, w) y = Relu (h)", "float[b, 4] y", {"w": (4, 4)}, "float[b, 4] x")
    other = model_of("h = MatMul (x, w) o = Relu (h)", "float[b, 4] o", {"w": (4, 4)}, "float[b, 4] x")
    feeds = {"x": np.ones((2, 4), np.float32)}
    with pytest.raises(InputError, match="no float output in common"):
        Objective(plain, other, Losses(), [feeds])
    with pytest.raises(InputError, match="no hidden states in common"):
        Objective(plain, plain, Losses(logits=0), [feeds])
    with pytest.raises(InputError, match="the task's loss needs labels"):
        Objective(plain, plain, Losses(task=1), [feeds])
    with pytest.raises(InputError, match="1 of 2 batches have no labels"):
        Objective(plain, plain, Losses(task=1), [feeds | {"labels": np.ones(2)}, feeds])
    with pytest.raises(InputError, match="labels repeat input_ids"):
        Objective(decoder(), decoder(), Losses(task=1), [FEEDS | {"labels": IDS}])


def test_only_a_decoder_is_its_own_task():
    both_ways = decoder(attention=ATTENTION.replace("is_causal = 1", "is_causal = 0"))
    with pytest.raises(InputError, match="only a decoder"):
        Objective(both_ways, both_ways, Losses(task=1), [FEEDS])


def test_weights_and_their_roles():
    weights = {
        "embed.weight": (6, 4),
        "fc.weight": (4, 8),
        "fc.bias": (8,),
        "gemm.weight": (3, 8),
        "gemm.bias": (3,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "sines": (6, 4),
        "factor": (4,),
    }
    model = model_of(
        "x = Gather (embed.weight, input_ids) t = Gather (sines, input_ids) p = Mul (t, factor)"
        " e = Add (x, p) n = LayerNormalization (e, norm.weight, norm.bias)"
        " axes = Constant <value_ints: ints = [1]> () m = ReduceMean <keepdims = 0> (n, axes)"
        " h = MatMul (m, fc.weight) c = Add (h, fc.bias)"
        " y = Gemm <transB = 1> (c, gemm.weight, gemm.bias)",
        "float[b, 3] y",
        weights,
    )
    assert float_weights(model) == [
        Weight("embed.weight", "embed", "embedding"),
        Weight("norm.weight", "norm", "norm"),
        Weight("norm.bias", "norm", "norm"),
        Weight("fc.weight", "fc", "linear", 0),
        Weight("fc.bias", "fc", "bias"),
        Weight("gemm.weight", "gemm", "linear", 1),
        Weight("gemm.bias", "gemm", "bias"),
    ]


def test_weights_of_convolutions_and_batch_norms_without_their_statistics():
    weights = {"c.weight": (4, 3, 3, 3), "c.bias": (4,)}
    weights |= {f"bn.{name}": (4,) for name in ("weight", "bias", "mean", "variance")}
    model = model_of(
        "h = Conv (x, c.weight, c.bias) y = BatchNormalization (h, bn.weight, bn.bias, bn.mean, bn.variance)",
        "float[b, 4, h, w] y",
        weights,
        "float[b, 3, h, w] x",
    )
    assert float_weights(model) == [
        Weight("c.weight", "c", "convolution", 1),
        Weight("c.bias", "c", "bias"),
        Weight("bn.weight", "bn", "norm"),
        Weight("bn.bias", "bn", "norm"),
    ]


def test_a_table_that_a_linear_shares_is_an_embedding():
    model = model_of(
        "x = Gather (head.weight, input_ids) logits = MatMul (x, head.weight)",
        "float[b, s, 6] logits",
        {"head.weight": (6, 6)},
    )
    assert float_weights(model) == [Weight("head.weight", "head", "embedding")]
