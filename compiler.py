"""`planish.compile`: a model in, passes applied in order, a model bound to a target out."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from .codegen import get_target
from .codegen.machine import cache_directory
from .codegen.target import Target
from .ir import clone, load
from .ir.checkpoint import load_checkpoint
from .ir.content_hash import content_hash
from .ir.errors import InputError, PipelineError
from .ir.load import LOADED_KEY
from .ir.outline import ModelOutline
from .ir.signature import Signature, flatten_inputs
from .ir.spill import spilling
from .ir.trace import trace
from .passes.infrastructure.driver import run_pipeline, size_of
from .passes.infrastructure.instruments import (
    ContractCheck,
    Instrument,
    OutlineBefore,
    VerifyAfterEachPass,
)
from .passes.infrastructure.pipeline import Pipeline
from .passes.infrastructure.recipe import Recipe
from .passes.infrastructure.recipe import preset as find_preset
from .passes.infrastructure.report import PipelineReport
from .runtime.calibration import CalibrationData
from .runtime.compiled_model import CompiledModel
from .runtime.example_inputs import example_inputs as example_inputs_of
from .runtime.provenance import (
    PARETO,
    RECIPE,
    REPORT,
    SEED,
    SOURCE,
    VERSIONS,
    note_binding,
    note_outlines,
    versions,
)
from .runtime.work_cache import WorkCache
from .runtime.workers import Workers, opened_workers
from .search import Budget, search

Check = Literal["contract", "verify", "none"]
Feeds = Mapping[str, np.ndarray[Any, Any]]

SPILL_VARIABLE = "PLANISH_SPILL_FROM"
"""Environment variable: bytes of a model's weights from which on new ones are kept in a file."""
_LARGE = 1 << 30
"""Bytes, where the variable says nothing."""
DEFAULT_PASSES = ("canonicalize", "fuse")


def compile(  # noqa: A001 — the name users know, as in torch.compile
    model: torch.nn.Module
    | torch.export.ExportedProgram
    | str
    | os.PathLike[str]
    | onnx.ModelProto
    | ir.Model,
    passes: Any = None,
    *,
    preset: str | None = None,
    budget: Budget | None = None,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    training: Any = None,
    target: str | Target | None = None,
    check: Check = "verify",
    seed: int | None = None,
    cache: bool | str | os.PathLike[str] = False,
    workers: Workers | int | str | None = None,
    instruments: Sequence[Instrument] = (),
) -> CompiledModel:
    """Compile a model: trace or load it, run the passes in order, bind the result to the target.

    Args:
        model: a torch module (needs ``example_inputs``, except transformers' causal language models, which
            are traced with their key-value cache), an `ExportedProgram`, a path to an ONNX file, the folder
            of a quantised checkpoint (see `load_checkpoint`), or an ONNX model in memory. It is not changed.
        passes: pass objects, names, `onnx_ir` passes, a list of those, a text pipeline such as
            ``"canonicalize,fuse,quantize{scheme=W8A8}"``, or the path (`pathlib.Path`) of a recipe, which may
            say the target and the seed, too. By default canonicalize and fuse.
        preset: instead of passes, a recipe that comes with planish: ``"cpu-int8"``, …; see `planish presets`.
        budget: instead of passes, what the result may take and lose: pruning, bits and the compression of the
            cache are searched for by what they are measured to give, see `planish.Budget`.
        example_inputs: for a module, what it is called with (a tensor, a tuple, or a dict of keyword
            arguments); for ONNX, a dict of arrays by graph-input name. Contract checks run on them.
        dynamic_shapes: as in `torch.export.export`; by default batch and sequence dimensions are dynamic.
        calibration: real inputs for passes that look at activations: an iterable (a torch DataLoader, say) of
            dicts, tensors or tuples, as the model is called with, or an object with onnxruntime's
            ``get_next()``. It is read once. A decoder's mask, positions and empty cache may be left out.
        training: real inputs for passes that train, as ``calibration``; items that are dicts may also have
            ``labels``, batch first. The calibration data if absent.
        target: ``"onnxruntime-cpu"``, ``"portable"``, ``"torch"``, ``"cuda"``, or a `Target` with options; by
            default what the recipe says, or onnxruntime-cpu.
        check: after each pass, ``"verify"`` the graph's structure, or also check each pass's ``"contract"``
            by running the model on ``example_inputs``; ``"none"`` checks nothing.
        seed: seeds every pass that draws random numbers; by default what the recipe says, or 0.
        cache: keep the results of long passes layer by layer, so that the same call goes on where it was when
            it is killed, and does not compute again what is the same. True for the user's cache folder
            (``planish cache list`` shows it), or a folder.
        workers: who does the work that falls into layers: so many threads (by default one for each core),
            ``"processes"`` or ``"processes:4"`` for processes of this machine, ``"ray"`` or
            ``"ray://address"`` for those of a Ray cluster (with the extra ``planish[ray]``), or
            `planish.runtime.workers.Workers`. The result does not depend on them.
        instruments: further instruments to run around the passes.

    Returns:
        The compiled model; where a pass had several results, as `prune` with several targets has, the last
        one, with the others as its ``alternatives``. With a budget, what there was to choose from is its
        ``front``.

    Raises:
        BudgetError: nothing within the budget was found.
        PlanishError: with one line that names the pass, the node, what was expected and what to do.
    """
    if budget is not None and (passes is not None or preset is not None):
        raise PipelineError("expected a budget, passes or a preset, found several", hint="give one of them")
    recipe = chosen_recipe(passes, preset)
    chosen = target or recipe.target or "onnxruntime-cpu"
    source = read_model(model, example_inputs, dynamic_shapes, hash_weights=True)
    compilation = _Compilation(
        source=source,
        calibration=_data(calibration, source),
        training=_data(training, source, labels=True),
        target=get_target(chosen) if isinstance(chosen, str) else chosen,
        check=check,
        seed=recipe.seed or 0 if seed is None else seed,
        cache=_work_cache(cache),
        workers=workers,
        instruments=instruments,
    )
    if budget is None:
        return compilation.run(recipe.pipeline, source.graph)
    return _searched(compilation, budget)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was read: in the IR, how it is called, and the example inputs as feeds."""

    graph: ir.Model
    signature: Signature | None
    examples: tuple[Feeds, ...]

    @functools.cached_property
    def content_hash(self) -> str:
        """Of the model as it was read: to be asked before passes change it."""
        found = self.graph.meta.pop(LOADED_KEY, None)
        return content_hash(self.graph) if found is None else str(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compilation:
    """Everything that a compilation needs beside its passes."""

    source: Source
    calibration: Sequence[Feeds]
    training: Sequence[Feeds]
    target: Target
    check: Check
    seed: int
    cache: WorkCache | None
    workers: Workers | int | str | None
    instruments: Sequence[Instrument]

    def run(self, pipeline: Pipeline, graph: ir.Model) -> CompiledModel:
        """Run the passes over a graph, in place, and bind what comes out."""
        origin = {
            RECIPE: pipeline.to_yaml(),
            SEED: str(self.seed),
            SOURCE: self.source.content_hash,
            VERSIONS: json.dumps(versions()),
        }
        before = OutlineBefore()
        with spilling(_spill_folder(graph)), opened_workers(self.workers) as hands:
            report = run_pipeline(
                graph,
                pipeline,
                target=self.target,
                examples=self.source.examples,
                calibration=self.calibration,
                training=self.training,
                seed=self.seed,
                cache=self.cache,
                workers=hands,
                instruments=(before, *_checks(self.check, self.source.examples), *self.instruments),
            )

            def bind(model: ir.Model, report: PipelineReport) -> CompiledModel:
                return _bind(model, report, origin, before.outline, self.target, self.source.signature)

            compiled = bind(graph, report)
            compiled.alternatives = {
                label: bind(other.model, other.report) for label, other in report.alternatives.items()
            }
        return compiled


def _searched(compilation: _Compilation, budget: Budget) -> CompiledModel:
    """Search for the passes; results of long ones are shared between trials."""
    source, data = compilation.source, compilation.calibration
    feeds = source.examples[0] if source.examples else example_inputs_of(source.graph)
    with tempfile.TemporaryDirectory(prefix="planish-search-") as folder:
        if compilation.cache is None:
            compilation = dataclasses.replace(compilation, cache=WorkCache(Path(folder)))
        found, points = search(
            lambda passes: compilation.run(Pipeline.of(passes), clone(source.graph)),
            budget,
            feeds=feeds,
            samples=data or source.examples or (feeds,),
            has_data=bool(data),
        )
    found.front = points
    # A decoder's graph is bound once more where prompts have kernels of their own.
    for model in {id(each): each for each in (found.model, found.bound.model)}.values():
        model.metadata_props[PARETO] = json.dumps([dataclasses.asdict(point) for point in points])
    return found


def _data(given: Any, source: Source, *, labels: bool = False) -> Sequence[Feeds]:
    return () if given is None else CalibrationData.read(given, source.graph, source.signature, labels=labels)


def chosen_recipe(passes: Any, preset: str | None) -> Recipe:
    """What `compile` is to do, from its first arguments."""
    if preset is None and isinstance(passes, Path):
        return Recipe.read(passes)
    if preset is None:
        return Recipe(Pipeline.of(DEFAULT_PASSES if passes is None else passes))
    if passes is not None:
        raise PipelineError("expected passes or a preset, found both", hint="leave one of them out")
    return find_preset(preset)


def _work_cache(cache: bool | str | os.PathLike[str]) -> WorkCache | None:
    if cache is False:
        return None
    found = WorkCache(None if cache is True else Path(cache))
    found.trim()
    return found


def spill_from() -> int:
    """Bytes of a model's weights from which on new ones are kept in a file.

    Raises:
        InputError: the environment variable says something else.
    """
    text = os.environ.get(SPILL_VARIABLE, str(_LARGE))
    if not text.isdigit():
        raise InputError(f"environment variable {SPILL_VARIABLE}: expected bytes, found {text!r}")
    return int(text)


def _spill_folder(graph: ir.Model) -> Path | None:
    """Where new weights of a large model are kept; None: in memory."""
    if size_of(graph)[1] < spill_from():
        return None
    folder = cache_directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir())
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _bind(
    graph: ir.Model,
    report: PipelineReport,
    origin: Mapping[str, str],
    before: ModelOutline | None,
    target: Target,
    signature: Signature | None,
) -> CompiledModel:
    """Write into the graph how it came to be, and bind it."""
    # Without times, so that the same compilation writes the same bytes.
    graph.metadata_props.update({**origin, REPORT: json.dumps(report.as_dict(costs=False))})
    note_outlines(graph, before)
    bound = target.bind(graph)
    note_binding(bound)
    if signature is not None:
        signature = signature.restricted(graph.graph)
    return CompiledModel(model=graph, bound=bound, target=target, report=report, signature=signature)


def read_model(model: Any, example_inputs: Any, dynamic_shapes: Any, *, hash_weights: bool = False) -> Source:
    """Trace or load a model; with ``hash_weights`` its `Source.content_hash` takes no reading of its own."""
    if isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        graph = trace(model, example_inputs, dynamic_shapes=dynamic_shapes)
        signature: Signature = graph.meta["planish.signature"]
        return Source(graph, signature, _module_feeds(signature, example_inputs))
    is_checkpoint = isinstance(model, str | os.PathLike) and (Path(model) / "config.json").is_file()
    graph = load_checkpoint(model) if is_checkpoint else load(model, hash_weights=hash_weights)
    if example_inputs is None:
        return Source(graph, graph.meta.get("planish.signature") if is_checkpoint else None, ())
    if not isinstance(example_inputs, Mapping):
        raise InputError(
            "example_inputs of an ONNX model: expected a dict of arrays, "
            f"found {type(example_inputs).__name__}",
            hint=f"the graph inputs are {[value.name for value in graph.graph.inputs]}",
        )
    return Source(graph, None, ({name: np.asarray(array) for name, array in example_inputs.items()},))


def _module_feeds(signature: Signature, example_inputs: Any) -> tuple[Feeds, ...]:
    if example_inputs is None:
        return ()
    if isinstance(example_inputs, Mapping):
        tensors = flatten_inputs(signature, (), dict(example_inputs))
    else:
        args = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        tensors = flatten_inputs(signature, tuple(args), {})
    # Through the adapter, because numpy has no bfloat16 of its own.
    return ({name: TorchTensor(tensor.detach().cpu()).numpy() for name, tensor in tensors.items()},)


def _checks(check: Check, examples: Sequence[Feeds]) -> tuple[Instrument, ...]:
    if check == "none":
        return ()
    if check == "verify":
        return (VerifyAfterEachPass(),)
    if check != "contract":
        raise PipelineError(f"check: expected 'contract', 'verify' or 'none', found {check!r}")
    if not examples:
        raise InputError(
            "check='contract' runs the model after each pass and needs inputs to run it on",
            hint="give example_inputs=",
        )
    return (VerifyAfterEachPass(), ContractCheck(examples))
