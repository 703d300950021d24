"""Learned rotations: orthogonal steps that descend, a model as a function of its rotations, learning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
import scipy.linalg
import scipy.special
import torch
from planish.codegen.torch_fx import INPUTS_KEY, lower, run
from planish.ir import clone
from planish.ir.errors import InputError, PassError
from planish.ir.shapes import infer_shapes
from planish.passes.rotate.cayley import CayleySGD, cayley, skew_direction
from planish.passes.rotate.hadamard import rotation
from planish.passes.rotate.learned import Learning, find_turns, learn_rotations, next_token_loss
from planish.passes.rotate.residual import residual_rotations
from planish.passes.rotate.turned_module import Turn, round_symmetrically, turned_module
from planish.passes.rotate.values import value_rotations

VOCABULARY, WIDTH = 12, 8

DECODER = """<ir_version: 11, opset_import: ["": 23]>
    net (int64[batch, length] input_ids, int64[batch, length] attention_mask)
      => (float[batch, length, 12] logits)
    <float[12, 8] "embed.weight" = {0}, float[8] "n0.weight" = {1}, float[8] "n1.weight" = {1},
     float[8] "n2.weight" = {1}, float[8, 8] "q.weight" = {0}, float[8, 4] "k.weight" = {0},
     float[8, 4] "v.weight" = {0}, float[4] "v.bias" = {0}, float[8, 8] "o.weight" = {0},
     float[8, 16] "up.weight" = {0}, float[16, 8] "down.weight" = {0}, float[8, 12] "lm_head.weight" = {0}>
    { x = Gather("embed.weight", input_ids)
      n = RMSNormalization <axis = -1> (x, "n0.weight")
      q = MatMul(n, "q.weight")  k = MatMul(n, "k.weight")
      p = MatMul(n, "v.weight")  v = Add(p, "v.bias")
      a = Attention <is_causal = 1, q_num_heads = 2, kv_num_heads = 1> (q, k, v)
      o = MatMul(a, "o.weight")  y = Add(x, o)
      m = RMSNormalization <axis = -1> (y, "n1.weight")
      u = MatMul(m, "up.weight")  g = Relu(u)  d = MatMul(g, "down.weight")  z = Add(y, d)
      e = RMSNormalization <axis = -1> (z, "n2.weight")
      logits = MatMul(e, "lm_head.weight") }"""


def decoder(seed: int = 0) -> ir.Model:
    """One layer, two query heads that share a key-value head; one channel of the stream is an outlier."""
    model = ir.from_proto(onnx.parser.parse_model(DECODER))
    rng = np.random.default_rng(seed)
    for name, value in model.graph.initializers.items():
        shape = value.const_value.shape.numpy()
        array = np.ones(shape) if name.startswith("n") else rng.standard_normal(shape) / math.sqrt(shape[0])
        if name == "embed.weight":
            array[:, 3] *= 30
        value.const_value = ir.Tensor(array.astype(np.float32), name=name)
    for node in model.graph:
        node.name = f"{node.outputs[0].name}.node"
    infer_shapes(model)
    return model


def feeds(count: int = 3, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, (2, 10)) for _ in range(count)]
    return [{"input_ids": each, "attention_mask": np.ones_like(each)} for each in ids]


def matrices(turns: Sequence[Turn], seed: int = 0) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rotation(turn.size, "random-matrix", rng).matrix) for turn in turns]


def logits_of(
    model: ir.Model, turns: Sequence[Turn], turned_by: Sequence[torch.Tensor], bits: int
) -> torch.Tensor:
    module = turned_module(
        model, turns, activation_bits=bits, weight_bits=None, ignore=("lm_head",), output="logits"
    )
    names = module.meta[INPUTS_KEY]
    arguments = {names[name]: torch.from_numpy(array) for name, array in feeds()[0].items()}
    arguments |= {f"rotation_{number}": matrix.float() for number, matrix in enumerate(turned_by)}
    return module(**arguments)["logits"]


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(rotation(size, "random-matrix", np.random.default_rng(seed)).matrix).clone()


def test_cayleys_transform_of_a_plane_is_a_rotation_by_twice_the_arc_tangent() -> None:
    skew = torch.tensor([[0.0, -0.8], [0.8, 0.0]], dtype=torch.float64)
    angle = 2 * math.atan(0.5 * 0.8 / 2)
    expected = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    np.testing.assert_allclose(cayley(skew, 0.5), expected, rtol=1e-14)


def test_steps_keep_matrices_orthogonal() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = orthogonal(24, 0).requires_grad_()
    optimizer = CayleySGD([matrix], momentum=0.9)
    for _ in range(100):
        matrix.grad = torch.randn(24, 24, dtype=torch.float64, generator=generator)
        optimizer.step(1.5)
    assert matrix.grad is None
    error = matrix.detach().T @ matrix.detach() - torch.eye(24, dtype=torch.float64)
    assert error.abs().max() < 1e-10


def test_step_turns_down_the_slope() -> None:
    target, matrix = orthogonal(6, 1), orthogonal(6, 2)
    gradient = -target  # of −tr(Tᵀ X)
    skew = skew_direction(matrix, -gradient)
    torch.testing.assert_close(skew, -skew.T)

    def loss(rate: float) -> float:
        return -float(torch.trace(target.T @ cayley(skew, rate) @ matrix))

    # A central difference of a smooth function: its error is of the order of the step's square.
    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    # d/dt X = W X at t = 0.
    assert slope == pytest.approx(float((gradient * (skew @ matrix)).sum()), rel=1e-6)
    assert slope < 0


def test_descent_finds_the_nearest_rotation() -> None:
    # The maximum of tr(Aᵀ X) over orthogonal X is a Procrustes problem with a solution in closed form.
    a = np.random.default_rng(0).standard_normal((5, 5))
    expected, _ = scipy.linalg.orthogonal_procrustes(np.eye(5), a)
    start = orthogonal(5, 0)
    if np.linalg.det(expected) * np.linalg.det(start) < 0:
        start[:, 0] *= -1  # turning does not reach reflections
    matrix = start.requires_grad_()
    optimizer = CayleySGD([matrix], momentum=0.5)
    for _ in range(500):
        (-(torch.from_numpy(a) * matrix).sum()).backward()
        optimizer.step(0.2)
    np.testing.assert_allclose(matrix.detach(), expected, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_is_to_the_nearest_step_and_passes_gradients(bits: int) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = round_symmetrically(x, bits)
    array = x.detach().numpy()
    levels = 2 ** (bits - 1) - 1
    step = np.abs(array).max(-1, keepdims=True) / levels
    integers = np.clip(np.rint(array / step), -levels, levels)
    # One rounding of float32 in x + (rounded − x).
    np.testing.assert_allclose(rounded.detach(), integers * step, rtol=0, atol=1e-6)
    (rounded * torch.arange(16.0)).sum().backward()
    torch.testing.assert_close(x.grad, torch.arange(16.0).expand(3, 16))
    assert not round_symmetrically(torch.zeros(2, 4), bits).any()


def test_rotations_leave_the_model_as_it_is_but_for_rounding() -> None:
    model = decoder()
    turns = find_turns(model)
    assert [(turn.label, turn.size) for turn in turns] == [("R1 embed", 8), ("R2 v", 4)]
    expected = run(lower(model), feeds()[0])["logits"]
    turned_by = matrices(turns)
    # 24 bits round no more than float32 does; the embedding's outlier is 30 times the rest.
    torch.testing.assert_close(logits_of(model, turns, turned_by, 24), expected, rtol=0, atol=1e-4)
    assert (logits_of(model, turns, turned_by, 4) - expected).abs().max() > 1e-2


def test_weights_may_have_any_name() -> None:
    """What is lowered is Python's source, in which a name must not end a string."""
    model = decoder()
    turns = find_turns(model)
    expected = logits_of(model, turns, matrices(turns), 24)
    for name in ("v.weight", "o.weight"):
        model.graph.initializers[name].name = f"{name[0]}\"'\\{{}}\n.weight"
    turns = find_turns(model)
    torch.testing.assert_close(logits_of(model, turns, matrices(turns), 24), expected, rtol=0, atol=0)


def test_rotations_learned_are_those_that_the_pass_makes() -> None:
    model = decoder()
    turns = find_turns(model)
    turned_by = matrices(turns)
    made = clone(model)
    by_label = {turn.label: matrix.numpy() for turn, matrix in zip(turns, turned_by, strict=True)}

    def draw(features: int, label: str):
        return lambda vectors: vectors @ by_label[label], ()

    for change in (*residual_rotations(made, draw)[0], *value_rotations(made, draw, across_heads=False)[0]):
        change.make(made)
    assert not np.allclose(
        made.graph.initializers["o.weight"].const_value.numpy(),
        model.graph.initializers["o.weight"].const_value.numpy(),
    )
    unturned = [torch.eye(turn.size, dtype=torch.float64) for turn in turns]
    # Steps of the 6-bit grid may flip where the weights differ by a rounding; 12 bits keep that small.
    torch.testing.assert_close(
        logits_of(model, turns, turned_by, 12), logits_of(made, turns, unturned, 12), rtol=0, atol=2e-3
    )


def test_weights_are_rounded_behind_their_rotation() -> None:
    model = decoder()
    turns = find_turns(model)
    settings = {"activation_bits": 24, "ignore": ("lm_head",), "output": "logits"}
    module = turned_module(model, turns, weight_bits=3, **settings)
    rounded = [node for node in module.graph.nodes if node.target is round_symmetrically]
    weights = [node for node in rounded if node.args[1] == 3]
    assert len(weights) == 6
    assert all(node.args[2] == 0 for node in weights)
    assert all(node.args[0].target.__name__ == "turn_vectors" for node in weights if "down" not in node.name)


def test_learning_lowers_the_loss() -> None:
    model, data = decoder(), feeds(1)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    learning = Learning(
        starts=1, steps=60, sequences=2, learning_rate=0.5, activation_bits=3, objective="next-token"
    )
    learned = learn_rotations(model, data, rng=np.random.default_rng(0), learning=learning)
    assert len(learned.losses) == 60
    # All steps see the same data, so the losses compare; rounding makes single ones jump.
    assert np.mean(learned.losses[-5:]) < np.mean(learned.losses[:5]) - 0.01
    assert list(learned.matrices) == ["R1 embed", "R2 v"]
    for matrix in learned.matrices.values():
        assert matrix.dtype == np.float64
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-10)
    for name, array in before.items():
        np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), array)


def test_objectives_compare_with_the_dense_model() -> None:
    model, data = decoder(), feeds(1)
    start = learn_rotations(
        model, data, rng=np.random.default_rng(0), learning=Learning(starts=1, steps=0)
    ).matrices
    turned_by = [torch.from_numpy(start[turn.label]) for turn in find_turns(model)]
    found = logits_of(model, find_turns(model), turned_by, 4).double().numpy()
    expected = run(lower(model), data[0])["logits"].double().numpy()
    p, q = (scipy.special.softmax(each, -1) for each in (expected, found))
    references = {
        "distillation": np.sum(p * np.log(p / q), -1).mean(),
        "output": np.sum((found - expected) ** 2) / np.sum(expected**2),
    }
    for objective, reference in references.items():
        learning = Learning(starts=1, steps=1, sequences=2, objective=objective)
        losses = learn_rotations(model, data, rng=np.random.default_rng(0), learning=learning).losses
        # Float32 logits: differences of 1e-6 in terms of 1e-2 and less.
        assert losses == pytest.approx((reference,), rel=1e-3)


def test_rotations_that_do_not_help_on_other_data_are_not_taken() -> None:
    model, data = decoder(), feeds(12)
    learning = Learning(starts=1, steps=30, sequences=2, learning_rate=1.5, activation_bits=3)
    start = learn_rotations(model, data, rng=np.random.default_rng(0), learning=Learning(starts=1, steps=0))
    outcomes = set()
    for first in (0, 1, 2, 3, 4, 5):
        learned = learn_rotations(model, data[first:], rng=np.random.default_rng(0), learning=learning)
        before, after = learned.held_out
        is_taken = not np.array_equal(learned.matrices["R1 embed"], start.matrices["R1 embed"])
        assert is_taken == (after < before)
        outcomes.add(is_taken)
    assert outcomes == {True, False}


def test_learning_is_reproducible() -> None:
    learning = Learning(steps=3, sequences=2)
    first, second, other = (
        learn_rotations(decoder(), feeds(), rng=np.random.default_rng(seed), learning=learning)
        for seed in (0, 0, 1)
    )
    assert first.losses == second.losses
    np.testing.assert_array_equal(first.matrices["R1 embed"], second.matrices["R1 embed"])
    assert first.losses != other.losses


def test_the_loss_is_of_the_token_after_each_and_leaves_out_padding() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 4, VOCABULARY)).astype(np.float32)
    ids = rng.integers(0, VOCABULARY, (2, 4))
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    pairs = [(0, 2), (1, 0), (1, 1)]  # (sequence, position) where it and the next are real
    likelihoods = [
        logits[b, t, ids[b, t + 1]] - np.log(np.exp(logits[b, t].astype(np.float64)).sum()) for b, t in pairs
    ]
    loss = next_token_loss(torch.from_numpy(logits), {"input_ids": ids, "attention_mask": mask})
    assert float(loss) == pytest.approx(-np.mean(likelihoods), rel=1e-5)


def test_what_cannot_be_learned_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="calibration data"):
        learn_rotations(decoder(), [], rng=rng)
    weighted = decoder()
    for name in ("n0.weight", "n1.weight", "n2.weight"):
        weighted.graph.initializers[name].const_value = ir.Tensor(np.full(WIDTH, 2, np.float32), name=name)
    assert [turn.label for turn in find_turns(weighted)] == ["R2 v"]
    weighted.graph.outputs[0].name = "hidden"
    with pytest.raises(InputError, match="objective=distillation needs a model from 'input_ids' to 'logits'"):
        learn_rotations(weighted, feeds(), rng=rng, learning=Learning(objective="distillation"))
    plain = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 11, opset_import: ["": 23]> net (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }'
        )
    )
    with pytest.raises(PassError, match="neither R1 nor R2"):
        learn_rotations(plain, feeds(), rng=rng)


def test_learning_begins_with_the_best_of_the_first_rotations() -> None:
    model, data = decoder(), feeds(1)
    single = [
        learn_rotations(
            model, data, rng=np.random.default_rng(0), learning=Learning(starts=starts, steps=0)
        ).held_out[0]
        for starts in (1, 6)
    ]
    # One item of data is both what the first rotations are compared on and what is held out.
    assert single[1] < single[0]
