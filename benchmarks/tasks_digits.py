"""scikit-learn's handwritten digits (1,797 images of 8 × 8), and two small networks that learn them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tasks_classifier import LABELS, Data, Task, fit, trained
from torch import nn
from torch.nn import functional

_CLASSES = 10
_TEST_SHARE = 0.25
_NOISE = 0.3
"""Deviation, in units of the images': so few are soon learned by heart."""
_BATCH = 64
"""Of the deployment: matrix products take the time then, not calls."""
_STEPS, _DISTILL = 300, "batch=64,learning_rate=1e-3,task=1.0"


class VisionTransformer(nn.Module):
    """Overlapping 3 × 3 patches at stride 2, pre-norm blocks, mean over the 16 tokens.

    ``forward(images [batch, 1, 8, 8]) -> {"logits": [batch, 10]}``.
    """

    def __init__(self, width: int = 96, heads: int = 6, hidden: int = 384, blocks: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.positions = nn.Parameter(0.3 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _CLASSES)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x).mean(1))}


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + down(gelu(up(norm(x))))``."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(functional.gelu(self.up(self.ffn_norm(x))))


class Attention(nn.Module):
    """Multi-head attention of all tokens to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] in and out."""
        batch, tokens, width = x.shape
        query, key, value = (
            linear(x).view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).reshape(batch, tokens, width))


class ResidualNetwork(nn.Module):
    """Two stages of two residual blocks, at 8 × 8 and at 4 × 4.

    ``forward(images [batch, 1, 8, 8]) -> {"logits": [batch, 10]}``.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_normalised(1, width, 3), nn.ReLU())
        self.blocks = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
        )
        self.head = nn.Linear(2 * width, _CLASSES)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify."""
        return {"logits": self.head(self.blocks(self.stem(images)).mean((2, 3)))}


class ResidualBlock(nn.Module):
    """``relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))``."""

    def __init__(self, channels: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *_normalised(channels, outputs, 3, stride), nn.ReLU(), *_normalised(outputs, outputs, 3)
        )
        same = stride == 1 and channels == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_normalised(channels, outputs, 1, stride))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One block."""
        return functional.relu(self.shortcut(x) + self.branch(x))


def _normalised(channels: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels, outputs, kernel, stride, kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs)


def digits() -> tuple[Data, Data]:
    """Training and test images, [samples, 1, 8, 8] with mean 0 and deviation 1, and their labels."""
    found = load_digits()
    images = found.images.astype(np.float32)[:, None]
    training, test, labels, test_labels = train_test_split(
        images, found.target.astype(np.int64), test_size=_TEST_SHARE, stratify=found.target, random_state=0
    )
    mean, deviation = training.mean(), training.std()
    return (
        {"images": (training - mean) / deviation, LABELS: labels},
        {"images": (test - mean) / deviation, LABELS: test_labels},
    )


def vision_transformer(folder: Path, epochs: int | None, say: Callable[[str], None]) -> Task:
    """The transformer, trained or read from ``folder``."""
    torch.manual_seed(0)
    return _task("vit", "ViT on digits", VisionTransformer(), folder, epochs or 20, 32, 1e-3, say)


def residual_network(folder: Path, epochs: int | None, say: Callable[[str], None]) -> Task:
    """The convolutional network, trained or read from ``folder``."""
    torch.manual_seed(0)
    return _task("cnn", "CNN on digits", ResidualNetwork(), folder, epochs or 12, 64, 3e-3, say)


def _task(
    name: str,
    title: str,
    module: nn.Module,
    folder: Path,
    epochs: int,
    batch: int,
    learning_rate: float,
    say: Callable[[str], None],
) -> Task:
    training, test = digits()

    def train() -> None:
        fit(
            module,
            training,
            epochs=epochs,
            batch=batch,
            learning_rate=learning_rate,
            noise=_NOISE,
            say=say,
        )

    return Task(
        name=name,
        title=title,
        module=trained(module, folder / "weights.pt", train),
        training=training,
        test=test,
        batch=_BATCH,
        sequence=1,
        steps=_STEPS,
        distill=_DISTILL,
    )
