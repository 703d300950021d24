"""How a traced graph is called: from a module's arguments to graph inputs, from graph outputs to its result.

A module takes nested arguments (tensors, tuples, dictionaries, options) and returns nested results (a tensor,
a tuple, a ``ModelOutput``); a graph takes and returns a flat list of named tensors. A `Signature` is written
down while tracing and kept in ``model.meta["planish.signature"]``, so that the compiled model can be called
exactly like the module.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.utils._pytree as pytree

from .errors import InputError

META_KEY = "planish.signature"
"""Where `trace` keeps the signature in ``ir.Model.meta``."""

REMARKS_KEY = "planish.remarks"
"""Where `trace` keeps, in ``ir.Model.meta``, a tuple of sentences: what is not as a user may expect."""

CONFIG_KEY = "planish.config"
"""Where `trace` keeps, in ``ir.Model.meta``, the ``config.json`` of a model of transformers, as text."""

Path = tuple[str | int, ...]
"""Where a leaf stands in the call: the forward parameter's name, then keys and indices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signature:
    """The calling convention of a traced module.

    Attributes:
        input_names: the graph inputs, in order.
        output_names: the graph outputs, in order.
        input_paths: for each graph input, where its tensor stands in the call.
        parameters: the names of forward's positional parameters, to bind positional arguments.
        variadic: the name of forward's ``*args`` parameter, if it has one.
        constants: the arguments that are no tensors, with the values that the trace has fixed.
        output_tree: the structure of what the module returns; None if the graph's list is the result.
        output_constants: positions among the leaves of ``output_tree`` that the module always returns as the
            same value (None, a flag, a number).
        output_scalars: positions among the leaves that the module returns as Python integers.
        ignored_paths: where tensors may stand that the graph no longer takes, as a dropped layer's cache.
    """

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    input_paths: tuple[Path, ...]
    parameters: tuple[str, ...]
    variadic: str | None = None
    constants: tuple[tuple[Path, object], ...] = ()
    output_tree: pytree.TreeSpec | None = None
    output_constants: tuple[tuple[int, object], ...] = ()
    output_scalars: tuple[int, ...] = ()
    ignored_paths: tuple[Path, ...] = ()

    def restricted(self, graph: ir.Graph) -> Signature:
        """The convention of a graph that has lost inputs or outputs since it was traced.

        Tensors for lost inputs are accepted and not used; None stands where a lost output was.
        """
        inputs, outputs = ({str(value.name) for value in values} for values in (graph.inputs, graph.outputs))
        if set(self.input_names) <= set(inputs) and set(self.output_names) <= set(outputs):
            return self
        taken = dict(zip(self.input_names, self.input_paths, strict=True))
        constant = dict(self.output_constants)
        returned = [] if self.output_tree is None else range(self.output_tree.num_leaves)
        positions = [position for position in returned if position not in constant]
        lost = [
            position
            for position, name in zip(positions, self.output_names, strict=bool(positions))
            if name not in outputs
        ]
        return dataclasses.replace(
            self,
            input_names=tuple(name for name in taken if name in inputs),
            input_paths=tuple(path for name, path in taken.items() if name in inputs),
            ignored_paths=tuple(path for name, path in taken.items() if name not in inputs),
            output_names=tuple(name for name in self.output_names if name in outputs),
            output_constants=(*self.output_constants, *((position, None) for position in lost)),
        )

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Give the feeds, graph-input name to tensor, of one call; see `flatten_inputs`."""
        leaves = flatten_arguments(self._bind(args, kwargs))
        feeds = {}
        for name, path in zip(self.input_names, self.input_paths, strict=True):
            leaf = leaves.pop(path, None)
            if not is_tensor(leaf):
                found = "missing" if leaf is None else f"a {type(leaf).__name__}"
                raise InputError(
                    f"input {name!r} of the model is {found}; a tensor was expected",
                    hint=f"the model was traced with {', '.join(self.input_names)}",
                )
            feeds[name] = leaf
        for path in self.ignored_paths:
            leaves.pop(path, None)
        self._check_constants(leaves)
        return feeds

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """Give what the module would have returned for these graph outputs; see `unflatten_outputs`."""
        if len(outputs) != len(self.output_names):
            raise InputError(
                f"{len(outputs)} outputs were given, the model has {len(self.output_names)}: "
                + ", ".join(self.output_names)
            )
        if self.output_tree is None:
            return list(outputs)
        constants = dict(self.output_constants)
        tensors = iter(outputs)
        leaves: list[Any] = []
        for position in range(self.output_tree.num_leaves):
            if position in constants:
                leaves.append(constants[position])
            elif position in self.output_scalars:
                leaves.append(int(next(tensors)))
            else:
                leaves.append(next(tensors))
        return pytree.tree_unflatten(leaves, self.output_tree)

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(zip(self.parameters, args, strict=False))
        rest = tuple(args[len(self.parameters) :])
        if rest and self.variadic is None:
            raise InputError(
                f"{len(args)} positional arguments were given, the module takes {len(self.parameters)}: "
                + ", ".join(self.parameters)
            )
        twice = arguments.keys() & kwargs.keys()
        if twice:
            raise InputError(f"argument {sorted(twice)[0]!r} was given by position and by name")
        arguments.update(kwargs)
        if self.variadic is not None:
            arguments[self.variadic] = rest
        return arguments

    def _check_constants(self, leaves: Mapping[Path, Any]) -> None:
        traced = dict(self.constants)
        for path, leaf in leaves.items():
            if is_tensor(leaf):
                raise InputError(
                    f"input {path_name(path)!r} was not a tensor input when the model was traced",
                    hint="trace the model again with this input among the example inputs",
                )
            expected = traced.get(path)
            if leaf is not None and expected != leaf:
                raise InputError(
                    f"argument {path_name(path)!r} is {leaf!r}, the model was traced with {expected!r}",
                    hint="options are fixed by the trace: trace the model again with the value that you need",
                )


def flatten_inputs(
    signature: Signature, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Turn the arguments of a call of the module into feeds of the graph.

    Args:
        signature: what `trace` kept in ``model.meta["planish.signature"]``.
        args: positional arguments, as for the module.
        kwargs: keyword arguments, as for the module.

    Returns:
        Graph-input name to tensor (torch or NumPy, as it was given), in the order of the graph's inputs.

    Raises:
        InputError: a tensor is missing or was not there when tracing, or an option has another value.
    """
    return signature.flatten(args, kwargs or {})


def unflatten_outputs(signature: Signature, outputs: Sequence[Any]) -> Any:
    """Turn the outputs of the graph, in order, into what the module returns: the same classes and keys.

    Raises:
        InputError: there are more or fewer outputs than the graph has.
    """
    return signature.unflatten(outputs)


def is_tensor(leaf: object) -> bool:
    """Whether a leaf of a call becomes a graph input: a torch tensor or a NumPy array."""
    return isinstance(leaf, (torch.Tensor, np.ndarray))


def flatten_arguments(arguments: Mapping[str, Any]) -> dict[Path, Any]:
    """Flatten nested arguments into leaves by their path, in order."""
    return {
        (name, *path): leaf for name, value in arguments.items() for path, leaf in flatten_with_paths(value)
    }


def flatten_with_paths(tree: Any) -> list[tuple[Path, Any]]:
    """Flatten any pytree into (path, leaf) pairs; children of a class without key names are numbered."""

    def visit(node: Any, path: Path) -> None:
        children = _children(node)
        if children is None:
            flat.append((path, node))
            return
        for key, child in children:
            visit(child, (*path, key))

    flat: list[tuple[Path, Any]] = []
    visit(tree, ())
    return flat


def path_name(path: Path) -> str:
    """Spell a path as a graph name: ``("past", 0, "key")`` is ``past.0.key``."""
    return ".".join(str(key) for key in path)


def default_arguments(
    module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Give the defaults of the forward parameters that a call leaves out, by name.

    Raises:
        InputError: the arguments do not fit ``forward``.
    """
    signature = inspect.signature(module.forward)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(module).__name__}.forward: {error}",
            hint="give a tensor, a tuple of positional or a dict of keyword arguments",
        ) from error
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name not in given and parameter.default is not parameter.empty
    }


def _children(node: Any) -> list[tuple[str | int, Any]] | None:
    """Give the (key, child) pairs of one pytree node, or None for a leaf."""
    if pytree.tree_structure(node).is_leaf():
        return None
    if isinstance(node, Mapping):
        return list(node.items())
    children, _ = pytree.tree_flatten(node, is_leaf=lambda child: child is not node)
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, children, strict=True))
    return list(enumerate(children))
