"""Quantised checkpoints of small decoders, packed as the formats are documented.

The packers know nothing of the readers: rows of fields are one long Python integer, cut into words.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight [N, K]: integers, scales and zero points [N, G], the group [K] of each input."""

    integers: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    groups: np.ndarray

    def weight(self) -> torch.Tensor:
        centred = self.integers.astype(np.float64) - self.zero_points[:, self.groups]
        return torch.from_numpy(centred * self.scales.astype(np.float64)[:, self.groups]).float()


def random_layer(
    shape, *, bits, group_size=-1, symmetric=False, act_order=False, signed=False, seed=0, lowest_zero=1
) -> Layer:
    rng = np.random.default_rng(seed)
    outputs, inputs = shape
    size = inputs if group_size == -1 else group_size
    groups = np.arange(inputs) // size
    if act_order:
        rng.shuffle(groups)
    count = -(-inputs // size)
    offset = 1 << (bits - 1) if signed else 0
    integers = rng.integers(0, 1 << bits, (outputs, inputs)) - offset
    middle = (1 << (bits - 1)) - offset
    zero_points = np.full((outputs, count), middle)
    if not symmetric:
        zero_points = rng.integers(lowest_zero, 1 << bits, (outputs, count)) - offset
    scales = rng.uniform(0.5, 1, (outputs, count)) / (1 << bits) / 4
    return Layer(integers, scales.astype(np.float16), zero_points, groups)


def packed(fields, bits) -> np.ndarray:
    """Rows of fields as 32-bit words, from low bits to high and on into the next word."""
    rows = [sum(int(field) << (bits * i) for i, field in enumerate(row)) for row in np.asarray(fields)]
    words = -(-np.shape(fields)[1] * bits // 32)
    return np.array(
        [[row >> (32 * word) & 0xFFFFFFFF for word in range(words)] for row in rows], np.uint32
    ).view(np.int32)


def packed_whole(fields, bits) -> np.ndarray:
    """The same with 32 // bits fields to a word, and the rest of it unused."""
    per_word = 32 // bits
    parts = [packed(fields[:, i : i + per_word], bits) for i in range(0, fields.shape[1], per_word)]
    return np.concatenate(parts, axis=1)


def gptq(layer: Layer, bits, *, minus_one=True, with_groups=True) -> dict[str, np.ndarray]:
    zeros = layer.zero_points.T
    if not minus_one:
        qzeros = packed(zeros, bits)
    elif bits == 3:
        qzeros = packed((zeros - 1) & 7, bits)
    else:  # as GPTQModel does: one subtraction for a whole word, which borrows
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = (packed(zeros, bits).view(np.uint32) - np.uint32(ones)).view(np.int32)
    tensors = {
        "qweight": packed(layer.integers, bits).T,
        "qzeros": qzeros,
        "scales": layer.scales.T,
    }
    return tensors | ({"g_idx": layer.groups.astype(np.int32)} if with_groups else {})


def awq(layer: Layer) -> dict[str, np.ndarray]:
    def words(values):
        in_order = values.reshape(len(values), -1, 8)[:, :, list(AWQ_ORDER)]
        return packed(in_order.reshape(len(values), -1), 4)

    return {
        "qweight": words(layer.integers.T),
        "qzeros": words(layer.zero_points.T),
        "scales": layer.scales.T,
    }


def pack_quantized(layer: Layer, bits, *, symmetric, whole=False, act_order=False) -> dict[str, np.ndarray]:
    pack = packed_whole if whole else packed
    offset = 1 << (bits - 1)
    tensors = {
        "weight_packed": pack(layer.integers + offset, bits),
        "weight_scale": layer.scales,
        "weight_shape": np.array(layer.integers.shape, np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack((layer.zero_points + offset).T, bits).T
    if act_order:
        tensors["weight_g_idx"] = layer.groups.astype(np.int32)
    return tensors


def int_quantized(layer: Layer, *, symmetric=True) -> dict[str, np.ndarray]:
    tensors = {"weight": layer.integers.astype(np.int8), "weight_scale": layer.scales}
    return tensors if symmetric else tensors | {"weight_zero_point": layer.zero_points.astype(np.int8)}


def quantised_layers(module: torch.nn.Module, ignored=("lm_head",)) -> dict[str, tuple[int, int]]:
    """The linears of a model with [N, K]."""
    return {
        name: tuple(linear.weight.shape)
        for name, linear in module.named_modules()
        if isinstance(linear, torch.nn.Linear) and name not in ignored
    }


def write(folder: Path, module, layers, config, *, dtype=torch.float16, shards=1) -> torch.nn.Module:
    """Write a checkpoint, and make ``module`` the float model that it stands for.

    Args:
        folder: made.
        module: a decoder; its weights become those of the checkpoint.
        layers: the weight and the tensors of each quantised layer.
        config: ``quantization_config``; None for none.
        dtype: of what is not quantised.
        shards: files.
    """
    folder.mkdir()
    tensors = {}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
        for name, value in module.state_dict().items():
            if name.removesuffix(".weight") not in layers:
                tensors[name] = value.to(dtype).clone()
        for name, (layer, stored) in layers.items():
            module.get_parameter(f"{name}.weight").copy_(layer.weight())
            for key, array in stored.items():
                tensors[f"{name}.{key}"] = torch.from_numpy(np.array(array, order="C"))
    if module.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    stated = module.config.to_dict() | ({"quantization_config": config} if config else {})
    (folder / "config.json").write_text(json.dumps(stated))
    _write_files(folder, tensors, shards)
    return module


def _write_files(folder: Path, tensors, shards) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[shard::shards]
        save_file({name: tensors[name] for name in mine}, folder / file)
        places |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
