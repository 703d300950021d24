"""Where the rotations R1 and R2 come from: Hadamard matrices, drawn ones, or learned ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...ir.content_hash import graph_hash
from ..infrastructure.base import PassContext
from .hadamard import Kind, kronecker_hadamard, largest_block, rotation
from .learning_memory import LearningMemory
from .residual import Draw
from .vectors import VectorFunction, Vectors

Drawn = tuple[VectorFunction, tuple[str, ...]]


def random_draw(kind: Kind, rng: np.random.Generator) -> Draw:
    """Rotations of one kind, a new one at each call. Those of Hadamard are applied factor by factor."""

    def matrix(features: int, label: str) -> Drawn:
        del label
        return _times(rotation(features, kind, rng).matrix), ()

    def hadamard(features: int, label: str) -> Drawn:
        if largest_block(features) < 2:
            function, _ = random_draw("random-matrix", rng)(features, label)
            return function, (f"{features} channels have no Hadamard matrix: rotated by a random matrix",)
        transform = kronecker_hadamard(features)
        signs = rng.choice([-1.0, 1.0], features) if kind == "random-hadamard" else np.ones(features)

        def apply(vectors: Vectors) -> Vectors:
            return transform.apply(vectors * signs)

        return apply, () if transform.remark is None else (transform.remark,)

    return matrix if kind == "random-matrix" else hadamard


def learned_draw(
    model: ir.Model,
    ctx: PassContext,
    *,
    steps: int,
    sequences: int,
    learning_rate: float,
    activation_bits: int,
) -> Draw:
    """Rotations that are learned for ``model`` as it is, on the calibration data; see `learned`.

    Raises:
        InputError: there is no calibration data, or the objective does not fit the model.
        PassError: the model allows neither R1 nor R2.
    """
    # Here, because it imports torch, which takes seconds.
    from .learned import Learning, learn_rotations

    def progress(steps: Any) -> Any:
        return ctx.progress(steps, "learn rotations")

    learning = Learning(
        steps=steps, sequences=sequences, learning_rate=learning_rate, activation_bits=activation_bits
    )
    # The online rotations that the model has by now may depend on measured times.
    decided_by = repr((learning, graph_hash(model), ctx.rng.bit_generator.state))
    memory = LearningMemory(ctx.work(model), decided_by)
    learned = memory.finished(ctx.rng)
    if learned is None:
        data = list(ctx.calibration)
        learned = learn_rotations(
            model, data, rng=ctx.rng, learning=learning, progress=progress, memory=memory
        )
        memory.finish(learned, ctx.rng)
    before, after = learned.held_out
    outcome = "" if after < before else ": not lower, so the random rotations are taken"
    ctx.remark("learned rotations", f"loss on data kept from learning {before:.4g} → {after:.4g}{outcome}")
    fallback = random_draw("random-hadamard", ctx.rng)

    def draw(features: int, label: str) -> Drawn:
        matrix = learned.matrices.get(label)
        if matrix is not None:
            return _times(matrix), ()
        function, remarks = fallback(features, label)
        return function, ("not learned, but a random Hadamard rotation", *remarks)

    return draw


def _times(matrix: Vectors) -> VectorFunction:
    def apply(vectors: Vectors) -> Vectors:
        product: Vectors = vectors @ matrix
        return product

    return apply
