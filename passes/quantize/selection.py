"""Which layers a pass is asked to work on, and by which scheme: names, patterns, groups, metadata.

For each layer, the first of these that says something decides:

1. ``ignore``: the layer is left alone;
2. what `allocate` wrote into the layer's metadata: a scheme, or ``dense``;
3. ``config_groups``: the first group whose targets match; layers in no group are left alone;
4. the pass's own scheme, for its ``targets`` or for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ...ir.errors import PipelineError
from .scheme import Scheme, parse_scheme

SCHEME_KEY = "planish.scheme"
"""Metadata of a linear's node: ``dense``, or a scheme's name and options, ``W3A16 group_size=32``."""
DENSE = "dense"

ConfigGroup = Mapping[str, bool | int | str | tuple[str, ...]]

_GROUP_KEYS = frozenset({"targets", "scheme", "group_size", "symmetric"})


def parse_groups(groups: Mapping[str, ConfigGroup]) -> list[tuple[tuple[str, ...], Scheme]]:
    """Targets and scheme of each config group, in order.

    Raises:
        PipelineError: a group lacks its scheme or targets, or has options that groups do not have.
    """
    return [_parse_group(name, dict(group)) for name, group in groups.items()]


def _parse_group(
    name: str, group: dict[str, bool | int | str | tuple[str, ...]]
) -> tuple[tuple[str, ...], Scheme]:
    unknown = sorted(set(group) - _GROUP_KEYS)
    if unknown:
        raise PipelineError(
            f"quantize: config group {name!r} has no option {unknown[0]!r}",
            hint=f"its options are {sorted(_GROUP_KEYS)}",
        )
    scheme, targets = group.get("scheme"), group.get("targets")
    if not isinstance(scheme, str) or not isinstance(targets, str | tuple | list):
        raise PipelineError(f"quantize: config group {name!r} needs a scheme and targets, found {group}")
    group_size, symmetric = group.get("group_size"), group.get("symmetric")
    if isinstance(group_size, str | tuple) or isinstance(symmetric, str | tuple):
        raise PipelineError(f"quantize: config group {name!r}: group_size is a number and symmetric a flag")
    return (
        (targets,) if isinstance(targets, str) else tuple(targets),
        parse_scheme(scheme, group_size, None if symmetric is None else bool(symmetric)),
    )


def scheme_from_metadata(node: ir.Node) -> Scheme | str | None:
    """The scheme that was chosen for this node, `DENSE`, or None where nothing was.

    Raises:
        PipelineError: the metadata cannot be read.
    """
    text = node.metadata_props.get(SCHEME_KEY)
    if text is None or text == DENSE:
        return text
    name, *options = text.split()
    settings = dict(option.partition("=")[::2] for option in options)
    if not set(settings) <= {"group_size", "symmetric"}:
        raise PipelineError(f"quantize: node {node.name!r}: {SCHEME_KEY} {text!r} cannot be read")
    group_size, symmetric = settings.get("group_size"), settings.get("symmetric")
    return parse_scheme(
        name,
        None if group_size is None else int(group_size),
        None if symmetric is None else symmetric == "true",
    )
