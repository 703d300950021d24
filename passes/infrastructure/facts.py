"""Facts of a model between two passes: where they are kept, and which orders of passes they allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from ...ir.errors import ModelError, PipelineError
from . import registry
from .base import Fact, Pass
from .options import format_pass

_KEY = "planish.facts"


def facts_of(model: ir.Model) -> frozenset[Fact]:
    """The facts that passes have established of this model so far, or that `write_facts` left in its file.

    Raises:
        ModelError: the file says something else there.
    """
    if _KEY in model.meta:
        facts: frozenset[Fact] = model.meta[_KEY]
        return facts
    words = model.metadata_props.get(_KEY, "").split()
    unknown = sorted(set(words) - {fact.value for fact in Fact})
    if unknown:
        raise ModelError(
            f"metadata {_KEY!r}: expected facts that passes establish, found {unknown[0]!r}",
            hint="the file is damaged: compile the model again from its source",
        )
    return frozenset(Fact(word) for word in words)


def set_facts(model: ir.Model, facts: Iterable[Fact]) -> None:
    """Record what holds of this model, in `model.meta`: files do not keep it."""
    model.meta[_KEY] = frozenset(facts)


def write_facts(model: ir.Model, facts: Iterable[Fact]) -> None:
    """Record what holds of this model so that its file keeps it, for a graph saved between two passes.

    Not for graphs that were bound to a target: binding takes the canonical form away.
    """
    model.metadata_props[_KEY] = " ".join(sorted(fact.value for fact in facts))


def facts_after(pass_: Pass, facts: frozenset[Fact]) -> frozenset[Fact]:
    """What holds after a pass, given what held before it."""
    return (facts - pass_.destroys) | pass_.establishes


def check_order(passes: Sequence[Pass], facts: frozenset[Fact]) -> None:
    """Check that every pass finds the facts that it requires, and none that it forbids.

    Raises:
        PipelineError: names the pass, the fact, the pass that establishes it, and a pipeline that works.
    """
    violation = _first_violation(passes, facts)
    if violation is None:
        return
    position, fact, is_missing = violation
    pass_ = passes[position]
    where = f"pass {pass_.name!r} (number {position + 1} of {len(passes)})"
    repaired = _repair(passes, facts)
    hint = f'use "{",".join(format_pass(step) for step in repaired)}"' if repaired else None
    if is_missing:
        found = _explain_missing(passes[:position], fact)
        raise PipelineError(f"{where} requires the fact {fact.value!r}, {found}", hint=hint)
    culprit = _last_establishing(passes[:position], fact)
    holds = f"which {culprit.name!r} established before it" if culprit else "which already holds of the model"
    raise PipelineError(f"{where} cannot run on a model that is {fact.value!r}, {holds}", hint=hint)


def _first_violation(passes: Sequence[Pass], facts: frozenset[Fact]) -> tuple[int, Fact, bool] | None:
    """Position, fact and whether it is missing (or forbidden) of the first pass that cannot run."""
    for position, pass_ in enumerate(passes):
        for fact in sorted(pass_.requires - facts, key=lambda fact: fact.value):
            return position, fact, True
        for fact in sorted(pass_.forbids & facts, key=lambda fact: fact.value):
            return position, fact, False
        facts = facts_after(pass_, facts)
    return None


def _explain_missing(before: Sequence[Pass], fact: Fact) -> str:
    destroyer = next((step for step in reversed(before) if fact in step.destroys), None)
    provider = registry.establishing(fact)
    suffix = f"; {provider!r} establishes it" if provider else "; no installed pass establishes it"
    if destroyer and any(fact in step.establishes for step in before):
        return f"which {destroyer.name!r} destroyed before it{suffix}"
    return f"which nothing before it establishes{suffix}"


def _last_establishing(passes: Sequence[Pass], fact: Fact) -> Pass | None:
    return next((step for step in reversed(passes) if fact in step.establishes), None)


def _repair(passes: Sequence[Pass], facts: frozenset[Fact]) -> list[Pass] | None:
    """The passes in an order that works, with passes that establish missing facts put in; None: not found."""
    steps = list(passes)
    # Each round settles one violation; a pipeline that needs more rounds than this has no simple repair.
    for _ in range(2 * len(steps) + len(Fact)):
        violation = _first_violation(steps, facts)
        if violation is None:
            return steps
        position, fact, is_missing = violation
        steps = (_put_before if is_missing else _move_up)(steps, position, fact)
        if not steps:
            return None
    return None


def _put_before(steps: list[Pass], position: int, fact: Fact) -> list[Pass]:
    """Let a pass that establishes ``fact`` run before ``position``: a later one of the pipeline, or new."""
    later = next(
        (index for index in range(position + 1, len(steps)) if fact in steps[index].establishes), None
    )
    if later is not None:
        moved = steps[later]
        return [*steps[:position], moved, *steps[position:later], *steps[later + 1 :]]
    provider = registry.establishing(fact)
    if provider is None or registry.find(provider).name == steps[position].name:
        return []
    return [*steps[:position], registry.build(provider, {}), *steps[position:]]


def _move_up(steps: list[Pass], position: int, fact: Fact) -> list[Pass]:
    """Move the pass at ``position`` before the one that established the fact that it forbids."""
    for index in range(position - 1, -1, -1):
        if fact in steps[index].establishes:
            return [*steps[:index], steps[position], *steps[index:position], *steps[position + 1 :]]
    return []
