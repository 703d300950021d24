"""Names of initializers as paths of buffers in a tree of modules."""

from __future__ import annotations

import re

import torch

_UNWRITABLE = re.compile(r'["\\\x00-\x1f\x7f]')
"""What ends the text that torch writes a part of a path as, in the code of the module."""
_RESERVED = frozenset(dir(torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())))
"""What a module has of its own at its top; no buffer can take these names."""


class ModuleNames:
    """Gives each initializer a path of its own: its name, or one close to it where that cannot be.

    ``model.norm.weight`` is buffer ``weight`` of ``norm`` of ``model``. A path cannot be both a buffer and a
    module that holds buffers, have empty parts, hold quotes, or hide what every module has.
    """

    def __init__(self) -> None:
        self._buffers: set[str] = set()
        self._modules: set[str] = set()

    def add(self, name: str) -> str:
        """The path for a new initializer."""
        path = _UNWRITABLE.sub("_", name)
        if any(not part or part in _RESERVED for part in path.split(".")):
            path = "initializer_" + path.replace(".", "_")
        while not self._is_free(path):
            path = path.replace(".", "_") + "_"
        self._buffers.add(path)
        self._modules.update(_parents(path))
        return path

    def _is_free(self, path: str) -> bool:
        taken = path in self._buffers or path in self._modules
        return not taken and self._buffers.isdisjoint(_parents(path))


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
