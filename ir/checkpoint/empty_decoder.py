"""A causal language model of transformers without its weights, and filling it.

Parameters are put on torch's meta device as soon as they are made, so that no model takes more memory than
its weights do later. Buffers, such as the frequencies of rotary embeddings, are computed as usual.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..errors import ModelError
from .tensors import Tensors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Product(torch.nn.Module):
    """Stands for a quantised linear while a model is traced: x · W (+ bias).

    W [K, N] is one zero, expanded: it takes no memory, and its product is replaced afterwards.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        zeros = torch.zeros((), dtype=dtype).expand(in_features, out_features)
        self.weight = torch.nn.Parameter(zeros, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] → [..., N]."""
        product = torch.matmul(x, self.weight)
        return product if self.bias is None else product + self.bias


def empty_decoder(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """A causal language model with parameters on the meta device.

    Args:
        config: of transformers; what it says of quantisation is ignored.
        dtype: of its parameters.

    Raises:
        ModelError: transformers has no causal language model for the configuration.
    """
    from transformers import AutoModelForCausalLM  # optional dependency

    build: Any = AutoModelForCausalLM.from_config
    config = copy.deepcopy(config)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    try:
        with _parameters_on_meta():
            module: torch.nn.Module = build(config, dtype=dtype)
    except ValueError as error:
        raise ModelError(
            f"transformers has no causal language model for {type(config).__name__}",
            hint="load the float model yourself and quantise it with planish",
        ) from error
    return module.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    def moved(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> Any:
        del module, name
        if parameter is None or parameter.is_meta:  # a tied parameter stays one
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def replace_linears(
    module: torch.nn.Module, layers: frozenset[str], tensors: Tensors, dtype: torch.dtype
) -> None:
    """Put a `Product` in the place of each of these linears, with the bias that the checkpoint has.

    Raises:
        ModelError: the model has no linear of that name.
    """
    modules = dict(module.named_modules())
    for layer in sorted(layers):
        linear = modules.get(layer)
        in_features, out_features = _features(linear, layer, module)
        bias = _bias(linear, f"{layer}.bias", tensors, dtype)
        parent, _, name = layer.rpartition(".")
        setattr(modules[parent], name, Product(in_features, out_features, bias, dtype))


def _bias(
    linear: torch.nn.Module | None, name: str, tensors: Tensors, dtype: torch.dtype
) -> torch.Tensor | None:
    """The bias [N]; zeros that the checkpoint adds to a linear without one are left out."""
    if getattr(linear, "bias", None) is not None:
        return tensors[name].to(dtype)
    if name not in tensors or not tensors[name].any():
        return None
    return tensors[name].to(dtype)


def _features(linear: torch.nn.Module | None, layer: str, module: torch.nn.Module) -> tuple[int, int]:
    if isinstance(linear, torch.nn.Linear):
        return linear.in_features, linear.out_features
    if linear is not None and type(linear).__name__ == "Conv1D":  # GPT-2's linear, [K, N]
        in_features, out_features = linear.get_parameter("weight").shape
        return in_features, out_features
    found = "no such module" if linear is None else f"a {type(linear).__name__}"
    expected = f"a linear of {type(module).__name__}"
    raise ModelError(
        f"{layer} is quantised in the checkpoint: expected {expected}, found {found}",
        hint="experts that the model stacks into one tensor and quantised embeddings are not read",
    )


def fill(module: torch.nn.Module, tensors: Tensors, dtype: torch.dtype) -> None:
    """Give parameters on the meta device and persistent buffers the checkpoint's values.

    Raises:
        ModelError: the checkpoint lacks a parameter, or has it in another shape.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names.setdefault(id(parameter), []).append(name)
    values = {key: _value(same, module, tensors, dtype) for key, same in names.items()}
    for owner in module.modules():
        for name, found in list(owner.named_parameters(recurse=False)):
            if id(found) in values:
                setattr(owner, name, values[id(found)])
    state = module.state_dict()
    for name, buffer in module.named_buffers():
        if name in state and name in tensors:
            buffer.copy_(tensors[name])


def _value(
    names: list[str], module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Parameter:
    """The parameter that has these names, under the first of them that the checkpoint knows."""
    known = next((name for name in names if name in tensors), None)
    if known is None:
        raise ModelError(
            f"{type(module).__name__}: the checkpoint has no '{names[0]}'",
            hint="its layers may be named or stacked otherwise than in this version of transformers",
        )
    value, expected = tensors[known], module.get_parameter(known).shape
    if value.shape != expected or value.dtype not in _FLOATS:
        raise ModelError(
            f"'{known}': expected floats {list(expected)}, found {value.dtype} {list(value.shape)}"
        )
    return torch.nn.Parameter(value.to(dtype), requires_grad=False)
