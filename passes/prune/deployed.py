"""A model as it will be deployed, with the passes that come after pruning: what is timed is what will run.

A speed-up before fusion, or before quantisation, is not the one that the user gets.
"""

from __future__ import annotations

import onnx_ir as ir

from ...codegen.target import Target
from ...ir import clone
from ...ir.errors import PipelineError
from ..infrastructure.driver import run_pipeline
from ..infrastructure.pipeline import Pipeline


def deployed(model: ir.Model, text: str, target: Target) -> ir.Model:
    """A clone of ``model`` with the passes of the pipeline ``text`` applied; no pass has data.

    Args:
        model: not changed; its tensors are shared.
        text: a pipeline's text form, such as ``fuse``; empty for the model as it is.
        target: what the passes may ask about kernels.

    Raises:
        PipelineError: the text is no pipeline, or its order is not legal for this model.
        PlanishError: what a pass raised.
    """
    copy = clone(model)
    run_pipeline(copy, Pipeline.parse(text), target=target)
    return copy


def check_deployed_with(text: str, pass_name: str) -> None:
    """Refuse a ``deployed_with`` that is no pipeline when the pass is made, not after an hour of work.

    Raises:
        PipelineError: names the pass whose option it is.
    """
    try:
        Pipeline.parse(text)
    except PipelineError as error:
        raise PipelineError(f"{pass_name}: deployed_with: {error.message}", hint=error.hint) from error
