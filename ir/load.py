"""Reading ONNX models into the IR."""

from __future__ import annotations

import contextlib
import graphlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from .clone import clone
from .content_hash import ContentHash
from .errors import ModelError, VerificationError
from .external import map_external_tensors
from .opset import convert_opset, settle_ir_version
from .schemas import check_nodes
from .skeleton import read_skeleton
from .verify import verify
from .walk import all_graphs, all_nodes, root_graphs
from .weights import check_finite, detach_from_protobuf

REMARKS_KEY = "planish.remarks"
"""Key of ``model.meta``: a tuple of sentences about what could not be done while loading."""
LOADED_KEY = "planish.loaded"
"""Key of ``model.meta``: the model's `content_hash` when it was loaded, if that was asked for."""

_MAPPED_FROM = 2**26
"""Bytes of a file from which weights inside it are mapped and not read. Smaller ones are read at once: such
models stay whole if someone writes into the file."""


_MOST_NODES = 10**7
"""That the functions of a model may make when they are inlined."""


def load(
    source: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    check_weights: bool = True,
    hash_weights: bool = False,
) -> ir.Model:
    """Read a model into the IR: opset 23, weights in external or large files mapped into memory, not read.

    Models of opset 13 to 22 are converted. One that cannot be (it uses an op that opset 23 does not have)
    stays at its opset with a remark in ``model.meta["planish.remarks"]``; newer models stay at theirs.
    Subgraphs, model-local functions and ops of other domains are kept as they are.

    Args:
        source: the path of an ``.onnx`` file, a protobuf message (external data relative to the current
            folder), or an IR model, which is copied and never changed.
        check_weights: read every weight once to look for NaN and infinities.
        hash_weights: make of the same reading ``model.meta["planish.loaded"]``, the model's `content_hash`.

    Raises:
        ModelError: the file cannot be read or is damaged, its weights are missing or not numbers, its graph
            is malformed, or its opset is older than 13.
    """
    model, name, folder = _open(source)
    map_external_tensors(model, folder=folder, source=name)
    _check_parts(model, name)
    detach_from_protobuf(model, source=name)
    _make_constant_inputs_constant(model)
    _check_structure(model, name)
    _check_functions(model, name)
    check_nodes(model, source=name)
    remark = convert_opset(model, source=name)
    settle_ir_version(model)
    if remark is not None:
        model.meta[REMARKS_KEY] = (*model.meta.get(REMARKS_KEY, ()), remark)
    if check_weights:
        hashes = ContentHash(model) if hash_weights else None
        check_finite(model, source=name, hashes=hashes)
        if hashes is not None:
            model.meta[LOADED_KEY] = hashes.result()
    return model


def _open(
    source: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
) -> tuple[ir.Model, str, Path | None]:
    """The model, what to call it in errors, and where its data is unless its tensors know that themselves."""
    if isinstance(source, ir.Model):
        name = _describe(source.graph.name)
        try:
            return clone(source), name, None
        except VerificationError as error:
            raise _malformed(name, error) from None
    if isinstance(source, onnx.ModelProto):
        name = _describe(source.graph.name)
        return _from_proto(source, name), name, None
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return _from_proto(_read(path), str(path)), str(path), path.parent
    raise ModelError(
        f"cannot load a {type(source).__name__}",
        hint="pass a path, an onnx.ModelProto or an onnx_ir.Model; a torch module goes to planish.trace",
    )


def _describe(graph_name: str | None) -> str:
    return f"model '{graph_name}'" if graph_name else "the model"


def _read(path: Path) -> onnx.ModelProto:
    if path.is_dir():
        found = ", ".join(sorted(child.name for child in path.glob("*.onnx"))[:3])
        raise ModelError(
            f"{path} is a folder, not an ONNX file",
            hint=f"found in it: {found}" if found else "name the file",
        )
    try:
        size = path.stat().st_size
        if size < _MAPPED_FROM:
            proto = onnx.load(path, "protobuf", load_external_data=False)
        else:
            proto = read_skeleton(path)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", hint="check the path") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    except DecodeError as error:
        raise ModelError(
            f"{path} is not an ONNX model, or only a part of one", hint=_parse_hint(path)
        ) from error
    if not proto.HasField("graph") or not proto.ir_version:
        what = "is empty" if size == 0 else "is not an ONNX model, or only a part of one"
        raise ModelError(f"{path} {what}", hint=_parse_hint(path))
    return proto


def _parse_hint(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"PK\x03\x04"):
        return "this is a torch checkpoint or a zip archive: load it and pass the module to planish.trace"
    if start.startswith(b"version https://git"):
        return "this is a Git LFS pointer: run `git lfs pull` to get the model itself"
    if start[8:9] == b"{":
        return "this looks like a safetensors file, which holds weights and no graph"
    return "copy or download the file again"


def _from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    if len(proto.graph.sparse_initializer):
        raise ModelError(f"{name}: sparse initializers are not supported", hint="store the weights densely")
    seen: set[str] = set()
    for tensor in proto.graph.initializer:
        if tensor.name in seen:
            raise ModelError(
                f"{name}: two initializers are called '{tensor.name}'", hint="export the model again"
            )
        seen.add(tensor.name)
    try:
        with _without_warnings():
            return ir.serde.deserialize_model(proto)
    except (ir.serde.SerdeError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{name}: malformed ONNX, or a kind of value that is not supported: {_innermost(error)}",
            hint="check it with onnx.checker.check_model",
        ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """What the deserialiser warns of, the checks after it refuse."""
    logger = logging.getLogger("onnx_ir.serde")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _check_parts(model: ir.Model, name: str) -> None:
    """Check what the deserialiser lets pass: text that is not UTF-8 (it comes as bytes), empty attributes."""
    if any(isinstance(text, bytes) for text in _texts(model)):
        raise ModelError(f"{name}: holds text that is not UTF-8", hint="the file is damaged: export it again")
    for node in all_nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.UNDEFINED:
                raise ModelError(
                    f"{name}: node {node.op_type} '{node.name}': attribute '{attribute.name}' has no value",
                    hint="the file is damaged: export it again",
                )


def _texts(model: ir.Model) -> Iterator[object]:
    yield from (*model.opset_imports, *model.metadata_props, *model.metadata_props.values())
    for function in model.functions.values():
        yield from function.identifier()
    for graph in all_graphs(model):
        yield graph.name
        yield from (value.name for value in (*graph.inputs, *graph.initializers.values(), *graph.outputs))
        for node in graph:
            yield from (node.name, node.op_type, node.domain, node.overload, node.doc_string)
            yield from (value.name for value in (*node.inputs, *node.outputs) if value is not None)
            yield from (*node.attributes, *node.metadata_props, *node.metadata_props.values())


def _innermost(error: BaseException) -> str:
    """What was wrong in the first place, in one line: onnx_ir wraps an error for each message around it."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__


def _make_constant_inputs_constant(model: ir.Model) -> None:
    """Before version 4 of the file format, every initializer was listed as an input too, and was constant."""
    if model.ir_version >= 4:
        return
    for graph in all_graphs(model):
        kept = [value for value in graph.inputs if value.name not in graph.initializers]
        graph.inputs.clear()
        graph.inputs.extend(kept)
    model.ir_version = 4


def _check_structure(model: ir.Model, name: str) -> None:
    if not len(model.graph) and not model.graph.outputs:
        raise ModelError(f"{name}: the graph is empty", hint="export the model again")
    try:
        _verify_sorted(model)
    except VerificationError as error:
        raise _malformed(name, error) from None


def _check_functions(model: ir.Model, name: str) -> None:
    """Inlined, functions must end somewhere, and not in more nodes than anyone can run."""
    calls: dict[object, list[object]] = {
        identifier: [node.op_identifier() for node in function.all_nodes()]
        for identifier, function in model.functions.items()
    }
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        cycle = " → ".join("::".join(filter(None, called)) for called in reversed(error.args[1]))
        raise ModelError(f"{name}: a function calls itself: {cycle}", hint="export the model again") from None
    sizes: dict[object, int] = {}
    for identifier in order:
        sizes[identifier] = sum(sizes.get(called, 1) for called in calls.get(identifier, ())) or 1
    total = sum(sizes.get(node.op_identifier(), 1) for node in model.graph.all_nodes())
    if total > _MOST_NODES:
        raise ModelError(f"{name}: its functions make {total} nodes of it", hint="export the model again")


def _malformed(name: str, error: VerificationError) -> ModelError:
    result = ModelError(f"{name}: {error.message}", hint="check it with onnx.checker.check_model")
    for note in getattr(error, "__notes__", ()):
        result.add_note(note)
    return result


def _verify_sorted(model: ir.Model) -> None:
    """Verify; sort the nodes first if that is what is wrong, as runtimes do."""
    try:
        verify(model)
    except VerificationError:
        for root in root_graphs(model):
            try:
                root.sort()
            except ValueError:
                raise VerificationError(f"graph '{root.name}' has a cycle") from None
        verify(model)
