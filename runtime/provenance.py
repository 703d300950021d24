"""What a compiled file says of how it was made: the metadata that `planish.compile` writes into it.

| key | holds |
|---|---|
| ``planish.recipe`` | the passes, as YAML |
| ``planish.seed`` | what seeded them |
| ``planish.source`` | content hash of the model it was compiled from |
| ``planish.versions`` | JSON: the packages that compiled it |
| ``planish.report`` | JSON: what each pass covered, skipped and changed, its errors and its remarks |
| ``planish.outline`` | JSON: the model ``before`` and ``after`` the passes, see `planish.ir.outline` |
| ``planish.kernels`` | JSON: by kernel, the nodes of the outline that it was chosen for |
| ``planish.session_options`` | JSON: what onnxruntime must be told for these kernels |
| ``planish.pareto`` | JSON: what a search under a budget had to choose from, a list of `ParetoPoint` |
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch

from ..codegen.target import BoundModel
from ..ir.errors import ModelError
from ..ir.outline import ModelOutline, outline

RECIPE, SEED, SOURCE = "planish.recipe", "planish.seed", "planish.source"
REPORT, VERSIONS = "planish.report", "planish.versions"
OUTLINE, KERNELS, PARETO = "planish.outline", "planish.kernels", "planish.pareto"
SESSION_OPTIONS = "planish.session_options"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """One of the models that a search under a budget had to choose from.

    Attributes:
        label: what it is, in a few words.
        size: of its weights, in bytes.
        latency_ms: of a call, where it was measured.
        metric: how good it is, more is better.
        chosen: the file is this one.
        passes: the pipeline that compiles it.
        cache: bytes of a decoder's cache for 1,024 tokens; None where there is none.
    """

    label: str
    size: float
    latency_ms: float | None
    metric: float
    chosen: bool = False
    passes: str = ""
    cache: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a file came to be.

    Attributes:
        recipe: the passes, as YAML.
        seed: what seeded them.
        source: content hash of the model that it was compiled from.
        versions: of the packages that compiled it, by name.
        report: `PipelineReport.as_dict`, without times and memory.
        before: the model in canonical form; None in files of older versions.
        after: the model after the passes, before it was bound to kernels.
        kernels: by name of a node of ``after``, the kernel that it was bound to.
        pareto: what a search had to choose from; mostly empty.
    """

    recipe: str
    seed: str
    source: str
    versions: Mapping[str, str]
    report: Mapping[str, Any]
    before: ModelOutline | None
    after: ModelOutline | None
    kernels: Mapping[str, str]
    pareto: tuple[ParetoPoint, ...]

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Provenance:
        """From the metadata of a file.

        Raises:
            ModelError: planish did not write the file, or the metadata are damaged.
        """
        if RECIPE not in metadata or REPORT not in metadata:
            raise ModelError(
                "the file does not say how it was made: planish did not compile it",
                hint="`planish inspect` shows what is in any ONNX file",
            )
        try:
            outlines = json.loads(metadata.get(OUTLINE, "{}"))
            by_kernel = json.loads(metadata.get(KERNELS, "{}"))
            return cls(
                recipe=metadata[RECIPE],
                seed=metadata.get(SEED, ""),
                source=metadata.get(SOURCE, ""),
                versions=json.loads(metadata.get(VERSIONS, "{}")),
                report=json.loads(metadata[REPORT]),
                before=_outline(outlines, "before"),
                after=_outline(outlines, "after"),
                kernels={node: kernel for kernel, nodes in by_kernel.items() for node in nodes},
                pareto=tuple(ParetoPoint(**point) for point in json.loads(metadata.get(PARETO, "[]"))),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ModelError) as error:
            raise ModelError(
                f"the file's metadata is damaged: {error}", hint="compile the model again from its source"
            ) from error


def _outline(outlines: Mapping[str, Any], key: str) -> ModelOutline | None:
    found = outlines.get(key)
    return None if found is None else ModelOutline.from_dict(found)


def versions() -> dict[str, str]:
    """Of the packages that what is compiled depends on."""
    return {
        "planish": importlib.metadata.version("planish"),
        "onnx-ir": ir.__version__,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
    }


def note_outlines(model: ir.Model, before: ModelOutline | None) -> None:
    """Write into a model that is about to be bound what it was before the passes, and what it is.

    Nodes without a name get that of what they compute: the outlines, the kernels and onnxruntime's profiler
    know a node by its name.
    """
    for node in model.graph:
        node.name = node.name or node.outputs[0].name
    after = outline(model, count_zeros=True)
    outlines = {"before": (before or after).as_dict(), "after": after.as_dict()}
    model.metadata_props[OUTLINE] = json.dumps(outlines)


def note_binding(bound: BoundModel) -> None:
    """Write into a bound model which kernels it runs, and what they rely on, for whoever runs the file."""
    by_kernel: dict[str, list[str]] = {}
    for binding in bound.bindings:
        by_kernel.setdefault(binding.kernel, []).append(binding.node)
    bound.model.metadata_props[KERNELS] = json.dumps(by_kernel)
    if bound.session_options:
        bound.model.metadata_props[SESSION_OPTIONS] = json.dumps(dict(bound.session_options))
