"""First-order importance: how the loss would react to a gate on each structure.

    score(S) = mean over batches of (Σ_{w∈S} w · ∂L/∂w)²       w: the consumers' weights of the structure

With a gate g on the structure's output, ∂L/∂g at g = 1 is the inner sum, and −∂L/∂g estimates what removing
the structure does to the loss. Gradients are those of the graph's torch.fx form. The loss L of a batch is

- the mean cross entropy of the next token, where the graph has ``input_ids`` and an output
  ``logits`` [batch, sequence, vocabulary];
- for other logits, the mean cross entropy with the model's own most likely class;
- else the sum of the outputs with random signs: Σ v·y, v = ±1.

Source: Molchanov et al., "Importance estimation for neural network pruning", 2019,
https://arxiv.org/abs/1906.10771.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ...codegen.torch_fx import VALUE_KEY, lower, run
from ...ir.errors import PassError
from ...ir.structure import ChannelGroup, Member
from ...runtime.calibration.data import Feeds, token_mask
from ...runtime.training.losses import next_token_loss, rows
from ..infrastructure.base import PassContext

Doubles = npt.NDArray[np.float64]
Tensors = Mapping[str, torch.Tensor]

LOGITS = "logits"
_CACHE = "present"


def taylor(
    model: ir.Model, groups: Sequence[ChannelGroup], data: Sequence[Feeds], ctx: PassContext, seed: int
) -> dict[str, Doubles]:
    """The scores [structures] of every group, by its name, from one run over the data.

    Args:
        model: not changed.
        groups: those without consumers score 0.
        data: batches of complete feeds.
        ctx: shows progress.
        seed: of the random signs.

    Raises:
        PassError: the gradients are not finite.
    """
    names = {member.tensor for group in groups for member in group.consumers}
    module = lower(model, dtype=_precision(model, names), trainable=names)
    paths = {node.meta[VALUE_KEY]: str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    weights = {name: module.get_parameter(paths[name]) for name in names}
    generator = torch.Generator().manual_seed(seed)
    scores = {group.name: np.zeros(group.structures) for group in groups}
    for feeds in ctx.progress(data, "first-order scores"):
        module.zero_grad()
        loss(run(module, feeds), feeds, generator).backward()
        for group in groups:
            gradients = [_gate_gradients(weights[member.tensor], member) for member in group.consumers]
            scores[group.name] += np.sum(gradients, axis=0) ** 2 / len(data)
    broken = [name for name, values in scores.items() if not np.isfinite(values).all()]
    if broken:
        raise PassError(
            f"prune: the gradients of {broken[0]!r} are not finite on the calibration data",
            hint="look at the data and at the model's weights, or leave the group out with ignore=",
        )
    return scores


def _precision(model: ir.Model, names: set[str]) -> torch.dtype:
    wide = any(model.graph.initializers[name].dtype == ir.DataType.DOUBLE for name in names)
    return torch.float64 if wide else torch.float32


def loss(outputs: Tensors, feeds: Feeds, generator: torch.Generator) -> torch.Tensor:
    """The scalar whose change is estimated, for one batch; padding tokens do not count.

    Args:
        outputs: of the graph, by name.
        feeds: what it was given.
        generator: of the random signs, where they are needed.
    """
    real = token_mask(feeds)
    mask = None if real is None else torch.from_numpy(real)
    logits = outputs.get(LOGITS)
    if logits is not None and logits.ndim == 3 and "input_ids" in feeds:
        return next_token_loss(logits, torch.from_numpy(np.asarray(feeds["input_ids"])), mask)
    if logits is not None:
        found = rows(logits, mask)
        return torch.nn.functional.cross_entropy(found, found.argmax(-1))
    measured = [
        rows(output, mask)
        for name, output in outputs.items()
        if output.is_floating_point() and not name.startswith(_CACHE)
    ]
    return torch.stack([(_signs(output, generator) * output).sum() for output in measured]).sum()


def _signs(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, like.shape, generator=generator, dtype=like.dtype) * 2 - 1


def _gate_gradients(weight: torch.nn.Parameter, member: Member) -> Doubles:
    """[structures], Σ w · ∂L/∂w; zeros for a weight that the loss does not depend on."""
    if weight.grad is None:
        return np.zeros(len(member.indices))
    products = (weight.detach() * weight.grad).double().movedim(member.axis, 0)
    sums = products.reshape(len(products), -1).sum(dim=1).numpy()
    gradients: Doubles = sums[member.indices].sum(axis=1)
    return gradients
