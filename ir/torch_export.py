"""From a torch module to an ONNX graph through torch.export, with the names that users know.

`FlatModule` shows torch.export a module as a function from a flat list of tensors to a flat list of tensors,
so nested arguments, options and result classes never reach the exporter. `export` and `convert` run the two
steps of torch and turn their failures into one `TraceError` that names the submodule and source line. `tidy`
gives parameters, inputs, outputs and dimensions their names and drops what is only of use inside torch.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, cast

import onnx_ir as ir
import onnx_ir.passes.common as onnx_ir_passes
import torch
import torch.utils._pytree as pytree
from torch.export.graph_signature import ConstantArgument, InputKind

from .dynamic_shapes import DynamicDims, check_specialised, enlarge, label_shapes, torch_dynamic_shapes
from .errors import TraceError
from .signature import CONFIG_KEY, Path, flatten_with_paths, path_name

_PREFIX = "module"
_NOISY_LOGGERS = (
    "torch",
    "torch.onnx",
    "torch.export",
    "torch.fx",
    "torch._subclasses",
    "onnxscript",
    "onnx_ir",
)
_METADATA_OF_TORCH = (
    "pkg.torch.onnx.fx_node",
    "pkg.torch.onnx.stack_trace",
    "pkg.torch.export.ExportedProgram.graph_signature",
    "pkg.torch.export.ExportedProgram.range_constraints",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a module returns: its structure, its tensors' names, and the leaves that are no tensors."""

    tree: pytree.TreeSpec
    names: tuple[str, ...]
    constants: tuple[tuple[int, object], ...]
    scalars: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """A traced module: the graph with its names, what the module returns, and remarks on the trace."""

    model: ir.Model
    outputs: Outputs
    remarks: tuple[str, ...]


class OutputRecorder:
    """Remembers what a module returned when it was traced.

    It is no pytree: torch.export takes back every change of a list or dict that a module holds.
    """

    def __init__(self) -> None:
        self.outputs: Outputs | None = None


class FlatModule(torch.nn.Module):
    """A module as a function of a flat list of tensors.

    Args:
        module: the module, shared and not copied.
        call: calls the module with the tensors put in their places, and gives what it returns.
    """

    def __init__(
        self, module: torch.nn.Module, call: Callable[[torch.nn.Module, Sequence[torch.Tensor]], Any]
    ) -> None:
        super().__init__()
        self.module = module
        self._call = call
        self._recorder = OutputRecorder()

    @property
    def outputs(self) -> Outputs:
        """What the module returned when it was traced."""
        assert self._recorder.outputs is not None
        return self._recorder.outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the module and flatten what it returns; only tensors come out."""
        result = self._call(self.module, tensors)
        self._recorder.outputs, leaves = _describe(result)
        return leaves


def trace_flat(
    module: torch.nn.Module,
    call: Callable[[torch.nn.Module, Sequence[torch.Tensor]], Any],
    tensors: Mapping[str, torch.Tensor],
    dims: DynamicDims,
    *,
    opset: int,
) -> Traced:
    """Trace a module that is called with a flat list of tensors.

    Args:
        module: the module; shared, not copied.
        call: calls the module with the tensors put in their places.
        tensors: example inputs by the name that the graph input gets, in order.
        dims: the dimensions to leave open.
        opset: the ONNX opset of the result.

    Raises:
        TraceError: the module cannot be traced or expressed in ONNX, or fixes a dimension that was asked for.
    """
    names = list(tensors)
    flat = FlatModule(module, call)
    program = export(flat, enlarge(tensors, dims), dims)
    shapes = {name: value.shape for name, value in zip(names, input_values(program), strict=True)}
    remarks = check_specialised(dims, shapes)
    model = convert(program, opset=opset, title=type(module).__name__)
    parameters = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    tidy(model, parameters=parameters, input_names=names, output_names=flat.outputs.names)
    remarks += label_shapes(model, dims, shapes)
    as_json = getattr(getattr(module, "config", None), "to_json_string", None)
    if as_json is not None:
        stated = json.loads(as_json())
        model.meta[CONFIG_KEY] = json.dumps({**stated, "architectures": [type(module).__name__]})
    return Traced(model=model, outputs=flat.outputs, remarks=remarks)


def input_values(program: torch.export.ExportedProgram) -> list[Any]:
    """Give the user's inputs, in order: tensors without data, in whose shapes a size that was left open is a
    ``torch.SymInt``, and the constants as they are."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    return [
        spec.arg.value if isinstance(spec.arg, ConstantArgument) else values[spec.arg.name] for spec in specs
    ]


@contextlib.contextmanager
def tracing(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no exporter noise; every submodule's training flag is restored.

    What torch prints to the standard error on failure (the graph so far) is dropped: the `TraceError` tells.
    """
    training = [(submodule, submodule.training) for submodule in module.modules()]
    levels = [(logging.getLogger(name), logging.getLogger(name).level) for name in _NOISY_LOGGERS]
    try:
        module.eval()
        for logger, _ in levels:
            logger.setLevel(logging.CRITICAL)
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        for submodule, flag in training:
            submodule.training = flag


def export(
    flat: FlatModule, tensors: Mapping[str, torch.Tensor], dims: DynamicDims
) -> torch.export.ExportedProgram:
    """Run torch.export on the wrapped module.

    Raises:
        TraceError: the module cannot be traced; names the submodule and the line that stopped it.
    """
    module = flat.module
    shapes = torch_dynamic_shapes(dims, list(tensors))
    with tracing(flat):
        try:
            program = torch.export.export(
                flat, tuple(tensors.values()), dynamic_shapes=(shapes,), strict=False
            )
        except TraceError:
            raise
        except Exception as error:
            raise trace_error(error, module) from error
    return program


def trace_error(error: Exception, module: torch.nn.Module) -> TraceError:
    """Make a `TraceError` of what went wrong while a module ran: the submodule, the line, the first words."""
    place = _place_in_stack(error, module)
    return TraceError(
        f"{type(module).__name__} cannot be traced{place}: {_summary(error)}", hint=_hint(error)
    )


def convert(program: torch.export.ExportedProgram, *, opset: int, title: str) -> ir.Model:
    """Translate an exported program to ONNX ops, one to one: nothing is optimised, weights are shared.

    Raises:
        TraceError: the program writes to a buffer or input, or an operation has no ONNX form; names the
            submodule and the line it comes from.
    """
    _say_that_heads_are_shared(program)
    with tracing(torch.nn.Identity()):
        try:
            converted = torch.onnx.export(
                program, dynamo=True, opset_version=opset, optimize=False, verbose=False
            )
        except Exception as error:
            raise TraceError(
                f"{title} was traced, but ONNX opset {opset} cannot express"
                f"{_place_of_operation(error)}: {_summary(error)}",
                hint="replace this operation in the module by one that ONNX has",
            ) from error
    assert converted is not None
    assert converted.exported_program is not None
    _check_stateless(converted.exported_program, title)
    model = converted.model
    if model.functions:
        onnx_ir_passes.InlinePass()(model)
    return model


def _say_that_heads_are_shared(program: torch.export.ExportedProgram) -> None:
    """Mark attention whose one head of keys and values is broadcast to all queries as grouped.

    Torch's attention broadcasts silently; the ONNX operator wants to be told, and the two are the same.
    """
    for node in program.graph.nodes:
        if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
            continue
        query, key, value = (operand.meta["val"].shape for operand in node.args[:3])
        if len(query) == 4 and key[1] == value[1] == 1 and query[1] != 1:
            node.update_kwarg("enable_gqa", True)


def tidy(
    model: ir.Model,
    *,
    parameters: Mapping[str, torch.Tensor],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> None:
    """Give parameters, inputs and outputs their names and drop metadata that only torch can read.

    Args:
        model: a freshly converted model.
        parameters: the module's parameters and buffers under all their names.
        input_names: the names of the graph inputs, in order.
        output_names: the names of the graph outputs, in order.
    """
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix(f"{_PREFIX}.")
    _merge_tied(model, parameters)
    _separate_outputs(model)
    _name_values(model, input_names, output_names)
    for key in _METADATA_OF_TORCH:
        model.graph.metadata_props.pop(key, None)
    for node in model.graph.all_nodes():
        for key in _METADATA_OF_TORCH:
            node.metadata_props.pop(key, None)
        _strip_scopes(node)


def _check_stateless(program: torch.export.ExportedProgram, title: str) -> None:
    """Raise if the module writes to a buffer or input: only the first call would agree with the graph."""
    mutated = [
        *program.graph_signature.buffers_to_mutate.values(),
        *program.graph_signature.user_inputs_to_mutate.values(),
    ]
    if mutated:
        raise TraceError(
            f"{title} writes to {mutated[0].removeprefix(f'{_PREFIX}.')!r} in forward; a graph has no state",
            hint="return the new value instead, or switch the update off in evaluation mode",
        )


def output_name(path: Path) -> str:
    """Name the graph output at a path of what the module returns; a tuple's elements are ``output_0``, …."""
    if path and isinstance(path[0], int):
        return path_name((f"output_{path[0]}", *path[1:]))
    return path_name(path) or "output"


def _describe(result: Any) -> tuple[Outputs, tuple[torch.Tensor, ...]]:
    names: list[str] = []
    leaves: list[torch.Tensor] = []
    constants: list[tuple[int, object]] = []
    scalars: list[int] = []
    paths = flatten_with_paths(result)
    for position, (path, leaf) in enumerate(paths):
        if isinstance(leaf, torch.SymInt):
            scalars.append(position)
            leaf = torch.scalar_tensor(cast(int, leaf), dtype=torch.int64)
        if isinstance(leaf, torch.Tensor):
            names.append(output_name(path))
            leaves.append(leaf)
        elif leaf is None or isinstance(leaf, (bool, int, float, str)):
            constants.append((position, leaf))
        else:
            raise TraceError(
                f"the module returns a {type(leaf).__name__} in {path_name(path)!r}, not a tensor",
                hint="return tensors, or nest them in tuples, lists, dicts and ModelOutputs",
            )
    if not leaves:
        raise TraceError("the module returns no tensor", hint="return at least one tensor from forward")
    described = Outputs(
        tree=pytree.tree_structure(result),
        names=tuple(names),
        constants=tuple(constants),
        scalars=tuple(scalars),
    )
    return described, tuple(leaves)


def _merge_tied(model: ir.Model, parameters: Mapping[str, torch.Tensor]) -> None:
    """Make parameters that are one tensor in the module one initializer, under the first of their names.

    The other names are kept in the metadata property ``planish.tied_names``, comma-separated.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in parameters.items():
        names.setdefault(id(tensor), []).append(name)
    initializers = model.graph.initializers
    for first, *others in names.values():
        present = [initializers[name] for name in (first, *others) if name in initializers]
        if not others or not present:
            continue
        kept = present[0]
        for value in present[1:]:
            assert value.name is not None
            value.replace_all_uses_with(kept, replace_graph_outputs=True)
            initializers.pop(value.name)
        kept.name = first
        kept.metadata_props["planish.tied_names"] = ",".join(others)


def _separate_outputs(model: ir.Model) -> None:
    """Put an Identity where an output is an input, a weight or another output: each needs its own name."""
    seen: set[int] = set()
    for position, value in enumerate(list(model.graph.outputs)):
        if value.is_graph_input() or value.is_initializer() or id(value) in seen:
            node = ir.node("Identity", [value])
            copy = node.outputs[0]
            copy.type, copy.shape = value.type, value.shape
            model.graph.append(node)
            model.graph.outputs[position] = copy
        seen.add(id(value))


def _name_values(model: ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    graph = model.graph
    taken = set(graph.initializers)
    public: list[tuple[ir.Value, str]] = []
    for value, name in (
        *zip(graph.inputs, input_names, strict=True),
        *zip(graph.outputs, output_names, strict=True),
    ):
        unique = name
        while unique in taken:
            unique = f"{unique}_{'input' if value.is_graph_input() else 'output'}"
        taken.add(unique)
        public.append((value, unique))
    named = {id(value) for value, _ in public}
    for node in graph.all_nodes():
        for value in node.outputs:
            if id(value) not in named and value.name in taken:
                value.name = f"{value.name}_value"
    # Twice, because a new name may still be the old name of another input.
    for position, (value, _) in enumerate(public):
        value.name = f"planish.public.{position}"
    for value, name in public:
        value.name = name


def _strip_scopes(node: ir.Node) -> None:
    """Take the wrapper module out of the module path that the exporter noted on each node."""
    properties = node.metadata_props
    scopes = properties.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return
    names = ast.literal_eval(scopes)
    if len(names) < 2 or names[1] != _PREFIX:
        return
    properties["pkg.torch.onnx.name_scopes"] = repr(
        [
            name.removeprefix(_PREFIX).removeprefix(".") if i == 0 else _without_prefix(name)
            for i, name in enumerate(names[1:])
        ]
    )
    classes = ast.literal_eval(properties.get("pkg.torch.onnx.class_hierarchy", "[]"))
    properties["pkg.torch.onnx.class_hierarchy"] = repr(classes[1:])
    segments = properties.get("namespace", "").split("/")[1:]
    properties["namespace"] = "/".join(
        segment.removeprefix(_PREFIX).removeprefix(".") for segment in segments
    )


def _without_prefix(name: str) -> str:
    return name.removeprefix(f"{_PREFIX}.")


def _place_in_stack(error: BaseException, module: torch.nn.Module) -> str:
    """Find where an exception comes from: the innermost submodule, and the innermost line outside torch."""
    names = {id(submodule): name for name, submodule in module.named_modules()}
    places = [_place(chained.__traceback__, names) for chained in _chain(error)]
    found = [place for place in places if place]
    return found[-1] if found else ""


def _place(trace: TracebackType | None, names: Mapping[int, str]) -> str:
    owner, line = None, ""
    for frame, number in traceback.walk_tb(trace):
        candidate = frame.f_locals.get("self")
        if id(candidate) in names:
            owner = candidate
        if owner is not None and not _is_torch(frame.f_code.co_filename):
            line = f"{frame.f_code.co_filename}:{number}"
    if owner is None:
        return ""
    name = names[id(owner)] or "the module itself"
    return f" in {name} ({type(owner).__name__})" + (f" at {line}" if line else "")


def _place_of_operation(error: BaseException) -> str:
    """Find the traced operation that the converter stopped at: it notes the module and stack of each."""
    for chained in _chain(error):
        for frame, _ in traceback.walk_tb(chained.__traceback__):
            node = frame.f_locals.get("node")
            if isinstance(node, torch.fx.Node):
                return _describe_operation(node)
    return " this operation"


def _describe_operation(node: torch.fx.Node) -> str:
    modules = list(node.meta.get("nn_module_stack", {}).values())
    name = _without_prefix(modules[-1][0]) if modules else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [f"{file}:{number}" for file, number in lines if not _is_torch(file)]
    # The innermost line outside torch is the model's; the wrapper's own lines stand further out.
    place = f" at {outside[-1]}" if outside else ""
    owner = "the module itself" if name in ("", _PREFIX) else name
    return f" {node.target} in {owner}{place}"


def _chain(error: BaseException) -> list[BaseException]:
    """Give an exception and its stated causes; what was merely being handled then says nothing about it."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _is_torch(file: str) -> bool:
    return FilePath(file).is_relative_to(FilePath(torch.__file__).parent) or file == __file__


def _summary(error: BaseException) -> str:
    """Give the first line that says something, of the innermost exception."""
    innermost = _chain(error)[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return f"{type(innermost).__name__}: {lines[0]}" if lines else type(innermost).__name__


def _hint(error: BaseException) -> str:
    text = " ".join(f"{type(chained).__name__} {chained}" for chained in _chain(error))
    if "DataDependent" in text or "data-dependent" in text or "unbacked" in text:
        return (
            "the code decides by a tensor's value, which is not known when tracing: "
            "use torch.where or torch.cond, or pass the choice as an option"
        )
    if "ConstraintViolation" in text or "Constraints violated" in text:
        return "the model fixes or limits this size: see the torch.export message, and adapt dynamic_shapes"
    return "see the exception above for torch.export's whole message; dynamic_shapes={} traces at fixed sizes"
