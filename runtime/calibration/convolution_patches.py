"""What a convolution multiplies its weight with: the patches of its input that the kernel is laid on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from ...ir.views import Convolution

_UNFOLDED_AXES = 2


def can_unfold(convolution: Convolution) -> bool:
    """Whether patches can be taken: of signals and images, not of volumes."""
    return len(convolution.strides) <= _UNFOLDED_AXES


def patches(convolution: Convolution, array: npt.NDArray[np.floating]) -> Iterator[npt.NDArray[np.float32]]:
    """[patches, channels / groups · |kernel|] of each group of channels, channel by channel.

    Args:
        convolution: of one or two spatial axes, with known padding.
        array: [batch, channels, …spatial].
    """
    images = torch.from_numpy(np.asarray(array, np.float32))
    axes = len(convolution.strides)
    kernel = tuple(dim for dim in convolution.weight.shape or () if isinstance(dim, int))[2:]
    pads, strides, dilations = convolution.pads or (), convolution.strides, convolution.dilations
    # Innermost axis first, as torch wants it; a signal is an image of one row.
    padding = [pads[index] for axis in reversed(range(axes)) for index in (axis, axis + axes)]
    images = torch.nn.functional.pad(images, padding)
    if axes == 1:
        images = images.unsqueeze(2)
        kernel, strides, dilations = (1, *kernel), (1, *strides), (1, *dilations)
    for channels in images.chunk(convolution.groups, dim=1):
        unfolded = torch.nn.functional.unfold(channels, kernel, dilation=dilations, stride=strides)
        yield unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1]).numpy()
