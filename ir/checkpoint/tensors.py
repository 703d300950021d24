"""The tensors of a checkpoint by name, each read when it is asked for."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_SEPARATE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside ``config.json`` in which older checkpoints say how they were quantised, and by what."""


class Tensors(Mapping[str, torch.Tensor]):
    """Tensors that are read at each access.

    Args:
        readers: what reads each tensor, by its name.
        source: what to call the checkpoint in errors.
    """

    def __init__(self, readers: Mapping[str, Callable[[], torch.Tensor]], source: str) -> None:
        self._readers = readers
        self.source = source

    @classmethod
    def of_folder(cls, folder: Path) -> Tensors:
        """Of a folder's safetensors files: those of the index, ``model.safetensors``, or all that there are.

        The files stay mapped into memory.

        Raises:
            ModelError: there are none, one is missing or damaged, or two hold a tensor of the same name.
        """
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for path in _files(folder):
            file = _open(path)
            for name in file.keys():  # noqa: SIM118 — no mapping
                if name in readers:
                    raise ModelError(f"{folder}: two files hold a tensor '{name}'", hint="keep one of them")
                readers[name] = functools.partial(file.get_tensor, name)
        return cls(readers, str(folder))

    @classmethod
    def of_module(cls, module: torch.nn.Module) -> Tensors:
        """Of a module: its parameters and persistent buffers."""
        readers = {
            name: functools.partial(torch.Tensor.cpu, tensor) for name, tensor in module.state_dict().items()
        }
        return cls(readers, type(module).__name__)

    def __getitem__(self, name: str) -> torch.Tensor:
        reader = self._readers.get(name)
        if reader is None:
            raise ModelError(f"{self.source}: there is no tensor '{name}'", hint="download it again")
        return reader()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def owners(self, *endings: str) -> frozenset[str]:
        """The modules that have a tensor of one of these names, such as ``qweight``."""
        return frozenset(
            owner for owner, _, ending in (name.rpartition(".") for name in self) if ending in endings
        )


def read_quantization_config(folder: Path) -> Mapping[str, Any] | None:
    """What a folder says of how it was quantised; None if it is not.

    Raises:
        ModelError: there is no ``config.json``, or a file is no JSON.
    """
    config = _read_json(folder / "config.json")
    found: Mapping[str, Any] | None = config.get("quantization_config") or config.get("compression_config")
    if found is not None:
        return found
    for name, method in _SEPARATE_CONFIGS.items():
        if (folder / name).is_file():
            return {"quant_method": method, **_read_json(folder / name)}
    return None


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ModelError(
            f"{folder}: expected {_SINGLE} or another safetensors file, found none",
            hint="give a folder in the layout of Hugging Face; save older .bin files as safetensors",
        )
    return found


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", hint="download the whole checkpoint") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}", hint="download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(
            f"{path} does not exist", hint="give a folder in the layout of Hugging Face"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path} is no JSON: {error}", hint="download it again") from error
    return content
