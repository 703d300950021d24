"""Losses against sums that are written out, and the learning rate against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from planish.ir.errors import InputError
from planish.runtime.training import learning_rate
from planish.runtime.training.losses import (
    divergence,
    hidden_error,
    label_loss,
    next_token_loss,
    relative_error,
    rows,
)


def random(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence(temperature):
    student, teacher = random(4, 7), random(4, 7, seed=1)
    total = 0.0
    for found, expected in zip(student.numpy(), teacher.numpy(), strict=True):
        q, p = softmax(found / temperature), softmax(expected / temperature)
        total += sum(p[i] * math.log(p[i] / q[i]) for i in range(7))
    assert divergence(student, teacher, temperature).item() == pytest.approx(total / 4 * temperature**2)


def test_gradient_of_the_divergence_is_the_difference_of_probabilities():
    student, teacher = random(4, 7).requires_grad_(), random(4, 7, seed=1)
    divergence(student, teacher, 2.0).backward()
    q, p = torch.softmax(student / 2, -1), torch.softmax(teacher / 2, -1)
    torch.testing.assert_close(student.grad, 2.0 * (q - p).detach() / 4)


def test_distances_of_states():
    student, teacher = random(5, 3), random(5, 3, seed=1)
    squares = ((student.numpy() - teacher.numpy()) ** 2).sum(1)
    assert hidden_error(student, teacher).item() == pytest.approx(squares.mean())
    assert relative_error(student, teacher).item() == pytest.approx(
        squares.sum() / (teacher.numpy() ** 2).sum()
    )
    assert relative_error(teacher, teacher).item() == 0


def test_relative_error_of_unit_vectors_is_twice_one_minus_the_cosine():
    student, teacher = (torch.nn.functional.normalize(random(6, 4, seed=seed), dim=-1) for seed in (0, 1))
    cosine = (student * teacher).sum(-1).mean()
    torch.testing.assert_close(relative_error(student, teacher), 2 * (1 - cosine))


def test_relative_error_from_a_teacher_that_is_zero_has_a_gradient():
    student = random(2, 3).requires_grad_()
    loss = relative_error(student, torch.zeros(2, 3, dtype=torch.float64))
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * student.detach())


def test_rows():
    tokens, images, pooled = random(2, 3, 4), random(2, 3, 4, 5), random(2, 3)
    torch.testing.assert_close(rows(tokens, MASK), tokens[MASK])
    torch.testing.assert_close(rows(tokens, None), tokens.reshape(6, 4))
    # A row is what all channels of one pixel make.
    torch.testing.assert_close(rows(images, None)[5 + 2], images[0, :, 1, 2])
    torch.testing.assert_close(rows(pooled, MASK), pooled)  # the mask's shape, but no tokens
    assert rows(random(4), None).shape == (4, 1)


def test_next_token_loss():
    logits, ids = random(2, 3, 5), torch.tensor([[1, 2, 3], [4, 0, 1]])
    # The third token of the first sequence is padding: it predicts nothing and is not predicted.
    pairs = [(0, 0), (1, 0), (1, 1)]
    expected = [-math.log(softmax(logits[b, t].numpy())[ids[b, t + 1]]) for b, t in pairs]
    assert next_token_loss(logits, ids, MASK).item() == pytest.approx(np.mean(expected))
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = [-math.log(softmax(logits[b, t].numpy())[ids[b, t + 1]]) for b, t in pairs]
    assert next_token_loss(logits, ids, None).item() == pytest.approx(np.mean(expected))


def test_label_loss_of_classes():
    logits = random(2, 3, 5)
    labels = torch.tensor([[1, -100, 3], [4, 0, 1]])
    counted = [(0, 0), (1, 0), (1, 1), (1, 2)]  # neither the ignored label nor the padding
    expected = [-math.log(softmax(logits[b, t].numpy())[labels[b, t]]) for b, t in counted]
    assert label_loss(logits, labels, MASK).item() == pytest.approx(np.mean(expected))
    classes = torch.tensor([2, 0], dtype=torch.int32)
    expected = [-math.log(softmax(logits[b, 0].numpy())[classes[b]]) for b in range(2)]
    assert label_loss(logits[:, 0], classes, None).item() == pytest.approx(np.mean(expected))


def test_label_loss_of_pixels():
    logits, labels = random(1, 4, 2, 2), torch.tensor([[[0, 1], [2, 3]]])
    expected = [-math.log(softmax(logits[0, :, y, x].numpy())[2 * y + x]) for y in (0, 1) for x in (0, 1)]
    assert label_loss(logits, labels, None).item() == pytest.approx(np.mean(expected))


def test_label_loss_of_numbers():
    output, labels = random(4, 1), random(4, seed=1)
    expected = np.square(output.numpy()[:, 0] - labels.numpy()).mean()
    assert label_loss(output, labels, None).item() == pytest.approx(expected)


def test_no_label_that_counts_gives_zero():
    logits = random(2, 5).requires_grad_()
    loss = label_loss(logits, torch.tensor([-100, -100]), None)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_labels_that_do_not_fit():
    with pytest.raises(InputError, match=r"integer labels of shape \[3\] do not fit the output's \[2, 5\]"):
        label_loss(random(2, 5), torch.tensor([1, 2, 3]), None)
    with pytest.raises(InputError, match=r"float labels of shape \[2\] do not fit the output's \[2, 5\]"):
        label_loss(random(2, 5), torch.tensor([1.0, 2.0]), None)
    with pytest.raises(InputError, match="expected classes from 0 to 4, found 1 to 5"):
        label_loss(random(2, 5), torch.tensor([1, 5]), None)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", [1, 2, 2, 1 + math.cos(math.pi / 4), 1, 1 + math.cos(3 * math.pi / 4)]),
        ("linear", [1, 2, 2, 1.5, 1, 0.5]),
        ("none", [1, 2, 2, 2, 2, 2]),
    ],
)
def test_learning_rate(decay, expected):
    found = [learning_rate(step, peak=2.0, steps=6, warmup=1 / 3, decay=decay) for step in range(6)]
    assert found == pytest.approx(expected)


def test_learning_rate_without_warmup_begins_at_its_peak():
    assert learning_rate(0, peak=2.0, steps=1, warmup=0.0, decay="cosine") == 2.0
