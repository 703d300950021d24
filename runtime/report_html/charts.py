"""Charts as inline SVG: columns over the layers of a model, bars, and points of a Pareto front.

Colours and fonts come from the page's style sheet by class, so that charts follow the reader's colour scheme.
Texts go through an XML writer, which escapes them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree

from markupsafe import Markup

from ..provenance import ParetoPoint

_WIDTH, _LEFT, _RIGHT = 880, 46, 4
_TOP, _PLOT, _BOTTOM = 32, 84, 6
_WIDEST_COLUMN = 44
_LINE_HEIGHT = 13
"""Labels nearer to one another than this would overlap."""
_CHARACTER = 6.2
"""Width of one in the labels of points."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a chart.

    Attributes:
        name: what it stands for; shown when the pointer is on it.
        value: its height; None where nothing is known.
        text: the value as text.
        kind: class for its colour.
    """

    name: str
    value: float | None
    text: str
    kind: str


def columns(title: str, data: Sequence[Column], ticks: Sequence[tuple[float, str]]) -> Markup:
    """A chart of one column for each entry, in their order.

    Args:
        title: what is shown, with its unit.
        data: at least one column with a value.
        ticks: heights at which a line is drawn, with their labels; the largest is the top.
    """
    top = max(height for height, _ in ticks)
    svg = _svg(_TOP + _PLOT + _BOTTOM, title, _summary(data))
    _text(svg, title, x=0, y=12, kind="title")
    base = _TOP + _PLOT
    labelled = math.inf
    for height, label in sorted(ticks, reverse=True):
        y = base - height / top * _PLOT
        _element(svg, "line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y, kind="grid")
        if abs(y - labelled) >= _LINE_HEIGHT and (base - y >= _LINE_HEIGHT or not height):
            _text(svg, label, x=_LEFT - 6, y=y + 4, kind="tick")
            labelled = y
    step = min(_WIDEST_COLUMN, (_WIDTH - _LEFT - _RIGHT) / len(data))
    for index, column in enumerate(data):
        group = _element(svg, "g", kind="column")
        ElementTree.SubElement(group, "title").text = f"{column.name}: {column.text}"
        x = _LEFT + index * step
        # What reacts to the pointer is the whole height, or small columns could not be hit.
        _element(group, "rect", x=x, y=_TOP, width=step, height=_PLOT, kind="hit")
        if column.value is not None:
            height = max(1.0, column.value / top * _PLOT) if column.value > 0 else 0.0
            width = max(step * 0.78, step - 2)
            _element(
                group, "rect", x=x + (step - width) / 2, y=base - height, width=width, height=height,
                kind=f"fill-{column.kind}",
            )  # fmt: skip
    return _markup(svg)


def rising_ticks(largest: float, *, percent: bool = False) -> list[tuple[float, str]]:
    """Zero, and one or two round numbers up to just above ``largest``."""
    if largest <= 0:
        return [(0.0, "0"), (1.0, "100 %" if percent else "1")]
    unit = 10.0 ** math.floor(math.log10(largest))
    top = next(factor * unit for factor in (1, 2, 4, 5, 10) if factor * unit >= largest * (1 - 1e-9))
    return [(height, _tick(height, percent=percent)) for height in (0.0, top / 2, top)]


def _tick(height: float, *, percent: bool) -> str:
    return f"{height * 100:g} %" if percent else f"{height:.6g}"


def bar(share: float, kind: str, description: str) -> Markup:
    """One bar as wide as its place allows times ``share``."""
    svg = ElementTree.Element(
        "svg",
        {
            "class": "bar",
            "viewBox": "0 0 100 10",
            "preserveAspectRatio": "none",
            "role": "img",
            "aria-label": description,
        },
    )
    _element(svg, "rect", x=0, y=0, width=100, height=10, kind="track")
    _element(svg, "rect", x=0, y=0, width=max(0.0, min(1.0, share)) * 100, height=10, kind=f"fill-{kind}")
    return _markup(svg)


def pareto(points: Sequence[ParetoPoint], metric: str) -> Markup:
    """The points by latency where all were timed, else by size, on one line; the chosen one stands out."""
    timed = all(point.latency_ms is not None for point in points)
    xs = [point.latency_ms or 0.0 if timed else point.size / 1e6 for point in points]
    axis = "latency, ms" if timed else "size, MB"
    height, left, top, bottom = 320, 64, 24, 44
    svg = _svg(height, f"{metric} by {axis}", f"{len(points)} points")
    place_x = _scale(xs, left + 10, _WIDTH - 30)
    place_y = _scale([point.metric for point in points], height - bottom - 10, top + 10)
    _text(svg, metric, x=0, y=12, kind="title")
    _text(svg, axis, x=_WIDTH - _RIGHT, y=height - 6, kind="axis")
    for tick in _round_numbers(xs):
        _element(svg, "line", x1=place_x(tick), x2=place_x(tick), y1=top, y2=height - bottom, kind="grid")
        _text(svg, f"{tick:.6g}", x=place_x(tick), y=height - bottom + 16, kind="middle")
    for tick in _round_numbers([point.metric for point in points]):
        _element(svg, "line", x1=left, x2=_WIDTH - _RIGHT, y1=place_y(tick), y2=place_y(tick), kind="grid")
        _text(svg, f"{tick:.6g}", x=left - 6, y=place_y(tick) + 4, kind="tick")
    places = sorted((place_x(x), place_y(point.metric)) for x, point in zip(xs, points, strict=True))
    _element(svg, "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places), kind="front")
    for x, point in zip(xs, points, strict=True):
        _point(svg, place_x(x), place_y(point.metric), point)
    return _markup(svg)


def _point(svg: ElementTree.Element, x: float, y: float, point: ParetoPoint) -> None:
    group = _element(svg, "g", kind="point chosen" if point.chosen else "point")
    ElementTree.SubElement(group, "title").text = f"{point.label}: {point.metric:.6g}"
    _element(group, "circle", cx=x, cy=y, r=8 if point.chosen else 5)
    goes_out = x + 12 + len(point.label) * _CHARACTER > _WIDTH
    # Where there is room, behind the point and below the line, which rises.
    if goes_out:
        _text(group, point.label, x=x - 12, y=y - 10, kind="tick")
    else:
        _text(group, point.label, x=x + 10, y=y + 18, kind="")


def _scale(numbers: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """Places for numbers: ``first`` for the smallest, ``last`` for the largest, in proportion between."""
    low, high = min(numbers), max(numbers)
    slope = (last - first) / (high - low) if high > low else 0.0
    return lambda number: first + (number - low) * slope


def _round_numbers(numbers: Sequence[float]) -> list[float]:
    """Three to seven round numbers between the smallest and the largest."""
    low, high = min(numbers), max(numbers)
    if high <= low:
        return [low]
    unit = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(factor * unit for factor in (1, 2, 5, 10) if (high - low) / (factor * unit) <= 6)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _summary(data: Sequence[Column]) -> str:
    known = [column for column in data if column.value is not None]
    lowest, highest = (pick(known, key=lambda column: column.value or 0.0) for pick in (min, max))
    return f"from {lowest.text} ({lowest.name}) to {highest.text} ({highest.name})"


def _svg(height: float, title: str, description: str) -> ElementTree.Element:
    return ElementTree.Element(
        "svg",
        {
            "class": "chart",
            "viewBox": f"0 0 {_WIDTH} {height:g}",
            "role": "img",
            "aria-label": f"{title}: {description}",
        },
    )


def _element(
    parent: ElementTree.Element, tag: str, *, kind: str = "", **attributes: object
) -> ElementTree.Element:
    texts = {
        name: f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, texts | ({"class": kind} if kind else {}))


def _text(parent: ElementTree.Element, text: str, *, x: float, y: float, kind: str) -> None:
    _element(parent, "text", x=x, y=y, kind=kind).text = text


def _markup(svg: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))
