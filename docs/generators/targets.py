"""The page of targets: where a compiled model runs, with which options and kernels."""

from __future__ import annotations

import dataclasses
import inspect

from planish.codegen import TARGETS, Target
from planish.passes.infrastructure.options import format_value

from .docstring import blocks, fields, markdown, table

_INTRODUCTION = """\
A target is where a compiled model runs. It *binds* each op of the [planish domain](ops.md), and some standard
ones, to a kernel that it has; `compiled.bound.bindings` says which and why, and so does
[the report](report.md). The target never changes what a model computes beyond what a kernel rounds.

| target | gives | for |
|---|---|---|
| `onnxruntime-cpu` | an ONNX file with the kernels that were fastest here | CPUs like this one; the default |
| `portable` | an ONNX file of standard ops | other runtimes and machines: OpenVINO, browsers, phones |
| `torch` | a torch module | any device, any precision, training |
| `cuda` | a torch module with kernels of our own | an NVIDIA GPU |

A target is given by its name, or with options:"""

_EXAMPLE = """\
```python
import planish

target = planish.get_target("onnxruntime-cpu", rows=(1,), threads=1)
compiled = planish.compile(model, example_inputs=inputs, target=target)
for binding in compiled.bound.bindings:
    print(binding.node, binding.op, binding.kernel, binding.reason)
```"""

_ORDER = ("onnxruntime-cpu", "portable", "torch", "cuda")


def page() -> str:
    """The overview and a section for each target."""
    names = sorted(TARGETS, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))
    return blocks("# Targets", _INTRODUCTION, _EXAMPLE, *(_section(name, TARGETS[name]) for name in names))


def _section(name: str, kind: type[Target]) -> str:
    module = inspect.getmodule(kind)
    assert module is not None
    docs = {name: text for base in reversed(kind.__mro__) for name, text in fields(base.__doc__).items()}
    about = markdown(module.__doc__).removeprefix(f"Target `{name}`: ")
    rows = [
        (f"`{field.name}`", f"`{format_value(field.default)}`", docs.get(field.name, ""))
        for field in dataclasses.fields(kind)
    ]
    return blocks(
        f"## {name}",
        about[0].upper() + about[1:],
        table(("option", "default", "what it is"), rows) or "It has no options.",
    )
