"""Trace a torch module into the IR.

The module goes through ``torch.export`` and the ONNX exporter without optimisation: the graph that comes out
is what the module's code says, with the parameters under their own names (`planish.passes.canonicalize`
gives it the canonical form). Inputs and outputs keep the names that users know: forward's arguments, and the
fields of what it returns.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
import torch.utils._pytree as pytree
from torch.export.graph_signature import ConstantArgument, OutputKind

from .causal_lm import is_causal_lm, returns_cache, trace_causal_lm
from .dynamic_shapes import (
    DynamicDim,
    check_specialised,
    default_dims,
    fixed_size,
    label_shapes,
    requested_dims,
)
from .errors import InputError
from .signature import (
    META_KEY,
    REMARKS_KEY,
    Path,
    Signature,
    default_arguments,
    flatten_arguments,
    flatten_with_paths,
    is_tensor,
    path_name,
)
from .torch_export import convert, input_values, output_name, tidy, trace_flat

__all__ = ["trace", "trace_causal_lm"]

_OPTIONS = (bool, int, float, str, enum.Enum, torch.dtype, torch.device)


def trace(
    module: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    opset: int = 23,
) -> ir.Model:
    """Trace a torch module into an ONNX graph that keeps its names and can be called like it.

    The module is traced in evaluation mode and left as it was. Weights are shared with it, not copied.

    Args:
        module: the module, or a finished ``torch.export.ExportedProgram``.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments, as the
            module is called; tensors may sit in nested tuples, lists and dicts. None for an
            ``ExportedProgram``. A causal language model of transformers is traced with its key-value cache
            (see `trace_causal_lm`) if this is None or has ``use_cache=True`` or ``past_key_values``.
        dynamic_shapes: which dimensions stay dynamic.

            - None or ``"auto"``: dimension 0 of every tensor (``batch_size``) and dimension 1 of integer and
              boolean tensors (``sequence_length``). Sizes that may differ between inputs must differ in the
              examples. A dimension that the model's code fixes stays static, with a remark in
              ``model.meta["planish.remarks"]``.
            - A dict by argument name, or a tuple in the order of the arguments, nested like them. A tensor's
              entry is ``{axis: name}``, one name per axis, ``"auto"``, or None for a static shape; a name is
              a string or a ``torch.export.Dim``. One name means one size. A dimension asked for in this way
              that the model's code fixes is an error. ``{}`` traces at fixed shapes.
        opset: the ONNX opset of the graph.

    Returns:
        The traced model. ``model.meta["planish.signature"]`` is its `Signature`. Parameters that the module
        ties are one initializer; the further names are in its metadata property ``planish.tied_names``.

    Raises:
        InputError: the example inputs or ``dynamic_shapes`` do not fit the module.
        TraceError: the module cannot be traced; names the submodule and the source line that stopped it.
    """
    if isinstance(dynamic_shapes, str) and dynamic_shapes != "auto":
        raise InputError(
            f"dynamic_shapes is {dynamic_shapes!r}", hint="the only word that it may be is 'auto'"
        )
    if isinstance(module, torch.export.ExportedProgram):
        return _trace_program(module, dynamic_shapes, opset)
    # What torch.compile returns wraps the module that is meant.
    module = getattr(module, "_orig_mod", module)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"a torch.nn.Module was expected, found a {type(module).__name__}")
    if is_causal_lm(module) and _wants_cache(example_inputs):
        if dynamic_shapes not in (None, "auto"):
            raise InputError(
                "dynamic_shapes cannot be chosen for a causal language model that is traced with its cache",
                hint="leave dynamic_shapes out: batch, sequence and past are dynamic",
            )
        return trace_causal_lm(module, opset=opset)
    if example_inputs is None:
        raise InputError(
            f"{type(module).__name__} needs example_inputs to be traced",
            hint="give a tensor, a tuple of positional or a dict of keyword arguments",
        )
    return _trace_module(module, example_inputs, dynamic_shapes, opset)


def _wants_cache(example_inputs: Any) -> bool:
    """Whether a causal language model is to be traced with its cache: no examples, or such that use it."""
    if isinstance(example_inputs, Mapping):
        return bool(example_inputs.get("use_cache")) or example_inputs.get("past_key_values") is not None
    return example_inputs is None


def _trace_module(module: torch.nn.Module, example_inputs: Any, dynamic_shapes: Any, opset: int) -> ir.Model:
    example = _example_call(module, example_inputs)
    tensors = {path_name(path): torch.as_tensor(leaf) for path, leaf in example.leaves if is_tensor(leaf)}
    paths = {path_name(path): path for path, leaf in example.leaves if is_tensor(leaf)}
    if not tensors:
        raise InputError(f"the example inputs of {type(module).__name__} hold no tensor")
    if dynamic_shapes is None or isinstance(dynamic_shapes, str):
        dims = default_dims(tensors)
    else:
        dims = requested_dims(dynamic_shapes, paths, tensors)
    traced = trace_flat(module, example.call, tensors, dims, opset=opset)
    given = {path: leaf for path, leaf in example.leaves if not is_tensor(leaf)}
    traced.model.meta[META_KEY] = Signature(
        input_names=tuple(value.name or "" for value in traced.model.graph.inputs),
        output_names=tuple(value.name or "" for value in traced.model.graph.outputs),
        input_paths=tuple(paths.values()),
        parameters=example.positional,
        variadic=example.variadic,
        constants=tuple({**example.defaults, **given}.items()),
        output_tree=traced.outputs.tree,
        output_constants=traced.outputs.constants,
        output_scalars=traced.outputs.scalars,
    )
    traced.model.meta[REMARKS_KEY] = example.remarks + traced.remarks
    return traced.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExampleCall:
    """A call of a module with example inputs, as the user wrote it, and the places of its leaves."""

    positional: tuple[str, ...]
    variadic: str | None
    leaves: tuple[tuple[Path, Any], ...]
    structure: pytree.TreeSpec
    defaults: Mapping[Path, Any]
    remarks: tuple[str, ...]

    def call(self, module: torch.nn.Module, tensors: Sequence[torch.Tensor]) -> Any:
        """Repeat the call with other tensors."""
        values = iter(tensors)
        leaves = [next(values) if is_tensor(leaf) else leaf for _, leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return module(*args, **kwargs)


def _example_call(module: torch.nn.Module, example_inputs: Any) -> _ExampleCall:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    else:
        args = (example_inputs,)
    remarks: tuple[str, ...] = ()
    if returns_cache(module) and "use_cache" not in kwargs:
        # The cache that the model would return is no tensor, and without a past it is of no use.
        kwargs["use_cache"] = False
        remarks = ("traced without a key-value cache",)
        if is_causal_lm(module):
            remarks = (f"{remarks[0]}; leave example_inputs out to trace with one",)
    defaults = default_arguments(module, args, kwargs)
    parameters = inspect.signature(module.forward).parameters.values()
    positional = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    leaves = tuple(_leaves(args, kwargs, positional, variadic))
    for path, leaf in leaves:
        if not (is_tensor(leaf) or leaf is None or isinstance(leaf, _OPTIONS)):
            raise InputError(
                f"example input {path_name(path)!r} is a {type(leaf).__name__}, neither tensor nor option",
                hint="give tensors, nested in tuples, lists and dicts, and plain values",
            )
    return _ExampleCall(
        positional=positional,
        variadic=variadic,
        leaves=leaves,
        structure=pytree.tree_structure((args, kwargs)),
        defaults={(name,): value for name, value in defaults.items() if not is_tensor(value)},
        remarks=remarks,
    )


def _leaves(
    args: Sequence[Any], kwargs: Mapping[str, Any], positional: Sequence[str], variadic: str | None
) -> list[tuple[Path, Any]]:
    """Give all leaves of a call with their paths, in the order in which torch flattens the call."""
    roots: list[Path] = [(name,) for name in positional]
    roots += [(variadic or "args", index) for index in range(len(args) - len(positional))]
    trees = [*zip(roots, args, strict=False), *(((name,), value) for name, value in kwargs.items())]
    return [((*root, *path), leaf) for root, tree in trees for path, leaf in flatten_with_paths(tree)]


def _trace_program(program: torch.export.ExportedProgram, dynamic_shapes: Any, opset: int) -> ir.Model:
    """Convert a finished program: its open dimensions are given; ``dynamic_shapes`` only names them."""
    leaves = _program_leaves(program)
    kinds = input_values(program)
    paths = {path_name(path): path for path, value in zip(leaves, kinds, strict=True) if is_tensor(value)}
    examples = [_example(value) for value in kinds if is_tensor(value)]
    tensors = dict(zip(paths, examples, strict=True))
    if dynamic_shapes is None or isinstance(dynamic_shapes, str):
        dims = default_dims(tensors)
    else:
        dims = requested_dims(dynamic_shapes, paths, tensors)
    shapes = {name: value.shape for name, value in zip(paths, filter(is_tensor, kinds), strict=True)}
    open_dims: dict[str, dict[int, DynamicDim]] = {
        name: {
            axis: dim for axis, dim in axes.items() if dim.required or fixed_size(shapes[name][axis]) is None
        }
        for name, axes in dims.items()
    }
    check_specialised(open_dims, shapes)

    outputs = flatten_with_paths(_numbered(program.call_spec.out_spec))
    constants = _output_constants(program)
    model = convert(program, opset=opset, title="the ExportedProgram")
    tidy(
        model,
        parameters=program.state_dict,
        input_names=list(paths),
        output_names=[output_name(path) for path, position in outputs if position not in constants],
    )
    model.meta[META_KEY] = Signature(
        input_names=tuple(value.name or "" for value in model.graph.inputs),
        output_names=tuple(value.name or "" for value in model.graph.outputs),
        input_paths=tuple(paths.values()),
        parameters=tuple(dict.fromkeys(str(path[0]) for path in leaves)),
        constants=tuple(
            (path, value) for path, value in zip(leaves, kinds, strict=True) if not is_tensor(value)
        ),
        output_tree=program.call_spec.out_spec,
        output_constants=tuple(constants.items()),
    )
    model.meta[REMARKS_KEY] = label_shapes(model, open_dims, shapes)
    return model


def _program_leaves(program: torch.export.ExportedProgram) -> list[Path]:
    """Give the path of every leaf of the program's inputs, in the order of its user inputs."""
    args, kwargs = _numbered(program.call_spec.in_spec)
    signature = program.module_call_graph[0].signature
    names = list(signature.forward_arg_names or []) if signature is not None else []
    names += [f"input_{position}" for position in range(len(names), len(args))]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    by_position = {position: path for path, position in flatten_arguments(arguments).items()}
    return [by_position[position] for position in range(len(by_position))]


def _numbered(spec: pytree.TreeSpec | None) -> Any:
    assert spec is not None
    return pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


def _output_constants(program: torch.export.ExportedProgram) -> dict[int, object]:
    specs = [s for s in program.graph_signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    return {
        position: spec.arg.value
        for position, spec in enumerate(specs)
        if isinstance(spec.arg, ConstantArgument)
    }


def _example(value: Any) -> torch.Tensor:
    """Give a tensor without storage that has the sizes which the program was traced with."""
    sizes = [size if isinstance(size, int) else int(size.node.hint) for size in value.shape]
    return torch.empty(sizes, dtype=value.dtype, device="meta")
