"""A classifier with its data: how it is trained, and how its files' accuracy and speed are measured.

Modules take tensors by name and return ``{"logits": [batch, classes]}``; data are arrays by graph-input name
with ``labels`` (int64) beside them, samples first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from planish.runtime.measure import Latency, interleaved_latency

Array = np.ndarray[Any, Any]
Data = Mapping[str, Array]

LABELS = "labels"
_EVALUATED_TOGETHER = 64
_TIMED_CALLS = 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A trained classifier and all that pruning it needs.

    Attributes:
        name: for folders and the command line.
        title: for tables.
        module: trained, in evaluation mode.
        training: what it was trained on; calibration and distillation see nothing else.
        test: what accuracy is measured on.
        batch: samples of a call of the deployment, which is what is timed.
        sequence: tokens of a sample there; 1 for images.
        steps: of each distillation.
        distill: further options of the pass `distill`.
    """

    name: str
    title: str
    module: torch.nn.Module
    training: Data
    test: Data
    batch: int
    sequence: int
    steps: int
    distill: str

    def example(self) -> dict[str, torch.Tensor]:
        """Two samples to trace the module with."""
        return {name: torch.from_numpy(array[:2]) for name, array in inputs(self.training).items()}

    def calibration(self, samples: int) -> list[Data]:
        """The first training samples, without labels, in batches."""
        return list(batches(inputs({name: array[:samples] for name, array in self.training.items()})))

    def deployment_feeds(self) -> Data:
        """One call of the deployment."""
        return {name: array[: self.batch] for name, array in inputs(self.test).items()}


def inputs(data: Data) -> Data:
    """Without the labels."""
    return {name: array for name, array in data.items() if name != LABELS}


def batches(data: Data, size: int = _EVALUATED_TOGETHER) -> Iterator[Data]:
    """Taken apart along the samples."""
    count = len(next(iter(data.values())))
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in data.items()}


def fit(
    module: torch.nn.Module,
    data: Data,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    say: Callable[[str], None],
    noise: float = 0.0,
    seed: int = 0,
) -> None:
    """Train with AdamW, one cycle of the learning rate, labels smoothed by 0.1; end in evaluation mode.

    Args:
        module: in which mode does not matter.
        data: with labels.
        epochs: rounds over the data.
        batch: samples per update.
        learning_rate: at its highest.
        say: told the loss after each round.
        noise: deviation of Gaussian noise on float inputs.
        seed: of the order and the noise.
    """
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    labels = tensors.pop(LABELS)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), learning_rate, weight_decay=0.05)
    steps = len(labels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=epochs * steps, pct_start=0.15
    )
    module.train()
    for epoch in range(epochs):
        total = 0.0
        # The last samples of a round that do not fill a batch wait for the next round.
        for chosen in torch.randperm(len(labels), generator=generator)[: steps * batch].split(batch):
            feeds = {name: tensor[chosen] for name, tensor in tensors.items()}
            for tensor in feeds.values():
                if tensor.is_floating_point():
                    tensor += noise * torch.randn(tensor.shape, generator=generator)
            logits = module(**feeds)["logits"]
            loss = torch.nn.functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        say(f"epoch {epoch + 1} of {epochs}: loss {total / steps:.3f}")
    module.eval()


def trained(module: torch.nn.Module, path: Path, train: Callable[[], None]) -> torch.nn.Module:
    """The module with the weights at ``path``; they are trained and written if they are not there."""
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()
    train()
    partial = path.with_suffix(".partial")
    torch.save(module.state_dict(), partial)
    partial.replace(path)
    return module.eval()


def open_file(path: Path) -> onnxruntime.InferenceSession:
    """Plain onnxruntime with default options, as somebody would who only received the file."""
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def accuracy(session: onnxruntime.InferenceSession, data: Data) -> float:
    """Share of the samples whose largest logit is the label's."""
    right = 0
    for part in batches(data):
        (logits,) = session.run(["logits"], dict(inputs(part)))
        right += int((logits.argmax(-1) == part[LABELS]).sum())
    return right / len(data[LABELS])


def latencies(
    sessions: Mapping[tuple[str, float], onnxruntime.InferenceSession], feeds: Data
) -> dict[tuple[str, float], Latency]:
    """What a call takes, all files in turns."""
    runs = {str(key): functools.partial(session.run, None, dict(feeds)) for key, session in sessions.items()}
    found = interleaved_latency(runs, repeats=_TIMED_CALLS, burst=1)
    return {key: found[str(key)] for key in sessions}
