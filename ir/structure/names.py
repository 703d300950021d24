"""Readable, unique names: the module path that weights have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from .groups import GroupKind, Member

_PARAMETER_NAMES = ("weight", "bias")


def module_path(tensor: str) -> str:
    """``encoder.layer.0.fc1.weight`` → ``encoder.layer.0.fc1``."""
    path, _, last = tensor.rpartition(".")
    return path if path and last in _PARAMETER_NAMES else tensor


def common_path(tensors: Sequence[str]) -> str:
    """The longest module path that all tensors are below; empty if there is none."""
    paths = [module_path(tensor).split(".") for tensor in dict.fromkeys(tensors)]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def group_names(members: Sequence[Sequence[Member]], kinds: Sequence[GroupKind]) -> list[str]:
    """A name for each group, given what it consists of.

    Usually the path that producers and consumers share. Where that says too little, since other groups are
    below it too, and for convolutions, whose consumers are the next layer: the path that producers share.
    """
    producers = [_tensors(group, ("producer",)) for group in members]
    names = [
        "hidden"
        if kind == "hidden"
        else common_path(made if kind == "convolution" else _tensors(group, ("producer", "consumer")))
        for group, kind, made in zip(members, kinds, producers, strict=True)
    ]
    above = _paths_above(names)
    counts = Counter(names)
    for index, name in enumerate(names):
        if not name or name in above or counts[name] > 1:
            names[index] = common_path(producers[index]) or module_path(producers[index][0])
    return unique(names)


def unique(names: Sequence[str]) -> list[str]:
    """Number the second and further ones of equal names: ``a``, ``a:2``, ``a:3``."""
    seen: Counter[str] = Counter()
    numbered: list[str] = []
    for name in names:
        seen[name] += 1
        numbered.append(name if seen[name] == 1 else f"{name}:{seen[name]}")
    return numbered


def _tensors(members: Sequence[Member], roles: tuple[str, ...]) -> list[str]:
    return [member.tensor for member in members if member.role in roles]


def _paths_above(names: Sequence[str]) -> set[str]:
    """Every path that is a proper part of one of the names."""
    above: set[str] = set()
    for name in names:
        parts = name.split(".")
        above.update(".".join(parts[:length]) for length in range(1, len(parts)))
    return above
