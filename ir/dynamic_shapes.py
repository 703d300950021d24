"""Which dimensions of a traced model stay dynamic, and what they are called.

torch.export names the sizes it leaves open ``s53``; users know them as ``batch_size`` and
``sequence_length``. Before the export, this module decides which dimensions to leave open and gives each a
label; after it, the labels replace the symbols in every shape of the graph.

Sizes 0 and 1 are special to torch.export (it treats them as constants, since they broadcast), so examples
are enlarged along every dimension that is to stay dynamic.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from .errors import InputError, TraceError
from .signature import Path

BATCH = "batch_size"
SEQUENCE = "sequence_length"

_SYMBOL = re.compile(r"\b[su]\d+\b")


@dataclasses.dataclass(frozen=True)
class DynamicDim:
    """One dimension to leave open: its label, what torch.export is told, whether the user asked for it."""

    label: str
    torch_dim: Any
    required: bool


DynamicDims = Mapping[str, Mapping[int, DynamicDim]]
"""Graph-input name to axis to dimension; what is not there is static."""


def default_dims(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[int, DynamicDim]]:
    """Leave open what users expect: dimension 0 is the batch, dimension 1 of integers and masks the sequence.

    Dimensions of the same kind share a label if the examples have the same size there. Another size gets a
    label of its own (``decoder_input_ids_sequence_length``), and a size of 1 beside larger ones broadcasts
    and stays static. Sizes that may differ between inputs must therefore differ in the examples.
    """
    kinds = {name: _kinds(tensor) for name, tensor in tensors.items()}
    sizes = {
        kind: [tensors[name].shape[axis] for name in tensors for axis, k in kinds[name].items() if k == kind]
        for kind in (BATCH, SEQUENCE)
    }
    dims: dict[str, dict[int, DynamicDim]] = {}
    for name, tensor in tensors.items():
        dims[name] = {}
        for axis, kind in kinds[name].items():
            size = tensor.shape[axis]
            if size == 1 and max(sizes[kind]) > 1:
                continue
            first = next(other for other in sizes[kind] if other != 1 or max(sizes[kind]) == 1)
            label = kind if size == first else f"{name}_{kind}"
            dims[name][axis] = DynamicDim(label, torch.export.Dim.AUTO, required=False)
    return dims


def requested_dims(
    dynamic_shapes: Any, paths: Mapping[str, Path], tensors: Mapping[str, torch.Tensor]
) -> dict[str, dict[int, DynamicDim]]:
    """Read ``dynamic_shapes`` as the user wrote it: see `planish.ir.trace.trace` for the forms.

    Raises:
        InputError: a name, axis or form is unknown, or one label stands for two sizes.
    """
    _check_names(dynamic_shapes, paths)
    defaults = default_dims(tensors)
    parameters = list(dict.fromkeys(path[0] for path in paths.values()))
    dims: dict[str, dict[int, DynamicDim]] = {}
    for name, path in paths.items():
        spec = _spec_at(dynamic_shapes, path, parameters, name)
        if spec == "auto":
            dims[name] = defaults[name]
            continue
        dims[name] = {}
        for axis, dim in _axes(spec, name, tensors[name].ndim):
            default = defaults[name].get(axis)
            label = default.label if default else f"{name}_dim_{axis}"
            resolved = _resolve(dim, label, name)
            if resolved is not None:
                dims[name][axis] = resolved
    _check_sizes(dims, tensors)
    return dims


def enlarge(tensors: Mapping[str, torch.Tensor], dims: DynamicDims) -> dict[str, torch.Tensor]:
    """Repeat the examples along dynamic dimensions of size 0 or 1, which torch.export would fix."""
    small = {
        dim.label: 0
        for name, axes in dims.items()
        for axis, dim in axes.items()
        if tensors[name].shape[axis] < 2
    }
    # Different sizes for different labels, so that no comparison in the model finds two of them equal.
    targets = {label: 2 + position for position, label in enumerate(small)}
    enlarged = {}
    for name, tensor in tensors.items():
        for axis, dim in dims.get(name, {}).items():
            if tensor.shape[axis] >= 2:
                continue
            if tensor.shape[axis] == 0:
                shape = list(tensor.shape)
                shape[axis] = 1
                tensor = tensor.new_zeros(shape)
            tensor = tensor.repeat_interleave(targets[dim.label], dim=axis)
        enlarged[name] = tensor
    return enlarged


def torch_dynamic_shapes(dims: DynamicDims, names: Sequence[str]) -> tuple[dict[int, Any] | None, ...]:
    """Give torch.export's form of the dimensions, one entry per tensor."""
    return tuple({axis: dim.torch_dim for axis, dim in dims.get(name, {}).items()} or None for name in names)


def check_specialised(dims: DynamicDims, shapes: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    """Compare what was to be dynamic with what the trace left open.

    Args:
        dims: what was asked for or assumed.
        shapes: the shapes of the exported inputs; a fixed dimension is an ``int``.

    Returns:
        A remark for each dimension that was assumed dynamic and that the model fixes.

    Raises:
        TraceError: the model fixes a dimension that the user asked for.
    """
    remarks = []
    for name, axes in dims.items():
        for axis, dim in axes.items():
            size = fixed_size(shapes[name][axis])
            if size is None:
                continue
            sentence = (
                f"dimension {axis} ({dim.label}) of {name!r} is fixed at {size} by the model's code"
                f"{_fixing_line(shapes[name][axis])}"
            )
            if dim.required:
                raise TraceError(
                    sentence,
                    hint="leave it out of dynamic_shapes, or change the code that depends on this size",
                )
            remarks.append(sentence)
    return tuple(remarks)


def fixed_size(size: int | torch.SymInt) -> int | None:
    """Give the value of a size that the trace has fixed, or None if it was left open."""
    value = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return None if value is None else int(value)


def label_shapes(
    model: ir.Model, dims: DynamicDims, shapes: Mapping[str, Sequence[int | torch.SymInt]]
) -> tuple[str, ...]:
    """Replace torch.export's symbols by the labels in the shapes of all values of the model.

    Args:
        model: a freshly converted model.
        dims: the labels, by the names under which the inputs were traced.
        shapes: the shapes of the exported inputs by those names, in the order of the graph's inputs.

    Returns:
        A remark for each label that the model requires to be equal to another one.
    """
    labels: dict[str, str] = {}
    derived: list[tuple[ir.Value, int, str]] = []
    remarks = []
    for value, name in zip(model.graph.inputs, shapes, strict=True):
        for axis, dim in dims.get(name, {}).items():
            symbol = value.shape[axis] if value.shape is not None else None
            if not isinstance(symbol, ir.SymbolicDim) or symbol.value is None:
                continue
            text = symbol.value
            fixed = fixed_size(shapes[name][axis])
            if fixed is not None:
                labels[text] = str(fixed)
            elif not _SYMBOL.fullmatch(text):
                derived.append((value, axis, dim.label))
            elif labels.setdefault(text, dim.label) != dim.label:
                remarks.append(f"the model's code requires {dim.label} to be equal to {labels[text]}")
    _rename_symbols(model, labels)
    for value, axis, label in derived:
        assert value.shape is not None
        value.shape = ir.Shape([*value.shape[:axis], label, *value.shape[axis + 1 :]])
    return tuple(dict.fromkeys(remarks))


def relabel(model: ir.Model, labels: Mapping[str, str]) -> None:
    """Replace whole dimensions, symbols or expressions as they are spelled, by labels in all shapes."""
    for value in _all_values(model):
        if value.shape is not None and any(str(dim) in labels for dim in value.shape):
            value.shape = ir.Shape([labels.get(str(dim), dim) for dim in value.shape])


def _fixing_line(size: int | torch.SymInt) -> str:
    """Give " at file:line" of the code that fixed a size, which torch keeps for each symbol it replaces."""
    if isinstance(size, int):
        return ""
    locations = getattr(size.node.shape_env, "replacements_slocs", {})
    location = locations.get(getattr(size.node, "_expr", None))
    if location is None:
        return ""
    if location.maybe_user_loc is not None:
        return f" at {location.maybe_user_loc}"
    frame = location.framework_loc
    return f" at {frame.filename}:{frame.lineno}"


def _rename_symbols(model: ir.Model, labels: Mapping[str, str]) -> None:
    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        text = _SYMBOL.sub(lambda match: labels.get(match[0], match[0]), dim.value)
        # A size that the model fixed while it was traced comes as the text of a number.
        return int(text) if text.isdecimal() else text

    for value in _all_values(model):
        if value.shape is not None and any(isinstance(dim, ir.SymbolicDim) for dim in value.shape):
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])


def _all_values(model: ir.Model) -> list[ir.Value]:
    values = list(model.graph.inputs)
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
    return values


def _kinds(tensor: torch.Tensor) -> dict[int, str]:
    kinds = {0: BATCH} if tensor.ndim else {}
    if tensor.ndim >= 2 and not (tensor.is_floating_point() or tensor.is_complex()):
        kinds[1] = SEQUENCE
    return kinds


def _check_names(dynamic_shapes: Any, paths: Mapping[str, Path]) -> None:
    known = {path[0] for path in paths.values()} | set(paths)
    if isinstance(dynamic_shapes, Mapping):
        for key in dynamic_shapes:
            if key not in known and dynamic_shapes[key] is not None:
                raise InputError(
                    f"dynamic_shapes names {key!r}, which is no tensor input of the model",
                    hint=f"inputs: {', '.join(paths)}",
                )


def _spec_at(spec: Any, path: Path, parameters: Sequence[str | int], name: str) -> Any:
    """Walk the nested ``dynamic_shapes`` down to the entry of one input."""
    if isinstance(spec, Mapping) and name in spec:
        return spec[name]
    if isinstance(spec, (tuple, list)):
        position = parameters.index(path[0])
        spec = spec[position] if position < len(spec) else None
    elif isinstance(spec, Mapping):
        spec = spec.get(path[0])
    for key in path[1:]:
        if isinstance(spec, Mapping):
            spec = spec.get(key)
        elif isinstance(spec, (tuple, list)) and isinstance(key, int) and key < len(spec):
            spec = spec[key]
    return spec


def _axes(spec: Any, name: str, rank: int) -> list[tuple[int, Any]]:
    if spec is None:
        return []
    if isinstance(spec, Mapping):
        items = list(spec.items())
    elif isinstance(spec, (tuple, list)):
        items = list(enumerate(spec))
    else:
        raise InputError(
            f"dynamic_shapes of input {name!r} is {spec!r}",
            hint="give {axis: name}, one name or None per axis, 'auto', or None",
        )
    for axis, _ in items:
        if not isinstance(axis, int) or not -rank <= axis < rank:
            raise InputError(f"dynamic_shapes names axis {axis!r} of input {name!r}, which has {rank} axes")
    return [(axis % rank, dim) for axis, dim in items]


def _resolve(dim: Any, label: str, name: str) -> DynamicDim | None:
    automatic = torch.export.Dim.AUTO
    if dim is None or isinstance(dim, int) or dim == torch.export.Dim.STATIC:
        return None
    if isinstance(dim, str):
        return DynamicDim(dim, automatic, required=True)
    if dim in (automatic, torch.export.Dim.DYNAMIC):
        return DynamicDim(label, automatic, required=dim == torch.export.Dim.DYNAMIC)
    if isinstance(dim, torch.export.Dim):
        return DynamicDim(dim.__name__, dim, required=True)
    raise InputError(
        f"dynamic_shapes of input {name!r} has {dim!r}", hint="use a name, a torch.export.Dim or None"
    )


def _check_sizes(dims: DynamicDims, tensors: Mapping[str, torch.Tensor]) -> None:
    seen: dict[str, tuple[int, str]] = {}
    for name, axes in dims.items():
        for axis, dim in axes.items():
            size = tensors[name].shape[axis]
            first, owner = seen.setdefault(dim.label, (size, name))
            if first != size:
                raise InputError(
                    f"dimension {dim.label!r} is {first} in example {owner!r} and {size} in example {name!r}",
                    hint="give dimensions that may differ different names",
                )
