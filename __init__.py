"""planish: a compiler for compressed neural networks.

    import planish

    compiled = planish.compile(model, "canonicalize,fuse,quantize{scheme=W8A8}", example_inputs=inputs)
    compiled(**inputs)                # called like the module it came from
    compiled.save("model.onnx")       # a file that plain onnxruntime loads

`compile` is the whole of it for most uses. `trace`, `load` and `save` give the IR itself; passes live in
`planish.passes`, targets in `planish.codegen`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codegen import get_target
    from .compiler import compile  # noqa: A004 — the name users know
    from .ir import load, save
    from .ir.checkpoint import load_checkpoint
    from .ir.errors import (
        BudgetError,
        ContractError,
        InputError,
        MissingDataError,
        ModelError,
        NothingCoveredError,
        PassError,
        PipelineError,
        PlanishError,
        TargetError,
        TraceError,
        VerificationError,
    )
    from .ir.trace import trace, trace_causal_lm
    from .planning import Plan, plan
    from .runtime.compiled_model import CompiledModel
    from .search import Budget

__all__ = [
    "Budget",
    "BudgetError",
    "CompiledModel",
    "ContractError",
    "InputError",
    "MissingDataError",
    "ModelError",
    "NothingCoveredError",
    "PassError",
    "PipelineError",
    "Plan",
    "PlanishError",
    "TargetError",
    "TraceError",
    "VerificationError",
    "compile",
    "get_target",
    "load",
    "load_checkpoint",
    "plan",
    "save",
    "trace",
    "trace_causal_lm",
]

# Names are imported when they are first used: a plug-in that only needs the pass protocol does not wait
# seconds for torch.
_PLACES = {
    "Budget": ".search",
    "CompiledModel": ".runtime.compiled_model",
    "Plan": ".planning",
    "compile": ".compiler",
    "get_target": ".codegen",
    "load": ".ir",
    "load_checkpoint": ".ir.checkpoint",
    "plan": ".planning",
    "save": ".ir",
    "trace": ".ir.trace",
    "trace_causal_lm": ".ir.trace",
}


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name, ".ir.errors" if name in __all__ else None)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(place, __name__), name)


def __dir__() -> list[str]:
    return __all__
