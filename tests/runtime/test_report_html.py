"""The HTML report: what is on the page, that nothing from a model gets out of its text, and how it looks."""

from __future__ import annotations

import dataclasses
import html.parser
import json
from pathlib import Path

import browser
import numpy as np
import onnx.helper
import onnx.numpy_helper
import planish
import pytest
from planish.ir.outline import BlockOutline, LayerOutline, ModelOutline
from planish.passes.infrastructure.instruments import LatencyAfterEachPass
from planish.runtime.provenance import ParetoPoint, Provenance
from planish.runtime.report_html import Content, measure, render
from planish.runtime.report_html.block_rows import block_rows
from planish.runtime.report_html.charts import Column, columns, pareto, rising_ticks
from planish.runtime.saved import read_saved

LAYERS, WIDTH, INNER = 3, 64, 128
HOSTILE = '<script>alert("x")</script>'


def write_model(path: Path, *, prefix: str = "model") -> Path:
    """x ← x + down(relu(up(x))) three times and a head, deterministic weights, as a file."""
    rng = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for index in range(LAYERS):
        layer = f"{prefix}.layers.{index}"
        for name, rows, width in (("up", WIDTH, INNER), ("down", INNER, WIDTH)):
            array = (rng.standard_normal((rows, width)) / 8).astype(np.float32)
            weights.append(onnx.numpy_helper.from_array(array, f"{layer}.{name}.weight"))
        nodes += [
            onnx.helper.make_node("MatMul", [x, f"{layer}.up.weight"], [f"{layer}.up"]),
            onnx.helper.make_node("Relu", [f"{layer}.up"], [f"{layer}.act"]),
            onnx.helper.make_node("MatMul", [f"{layer}.act", f"{layer}.down.weight"], [f"{layer}.down"]),
            onnx.helper.make_node("Add", [x, f"{layer}.down"], [f"{layer}.out"]),
        ]
        x = f"{layer}.out"
    array = rng.standard_normal((WIDTH, 8)).astype(np.float32)
    weights.append(onnx.numpy_helper.from_array(array, "lm_head.weight"))
    nodes.append(onnx.helper.make_node("MatMul", [x, "lm_head.weight"], ["logits"]))
    graph = onnx.helper.make_graph(
        nodes,
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch_size", WIDTH])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch_size", 8])],
        weights,
    )
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path
    )
    return path


FEEDS = {"x": np.random.default_rng(1).standard_normal((16, WIDTH)).astype(np.float32)}
PASSES = "canonicalize,fuse,quantize{scheme=W4A16,group_size=32,algorithm=gptq}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, compiled with all that can be measured on the way."""
    folder = tmp_path_factory.mktemp("report")
    compiled = planish.compile(
        write_model(folder / "model.onnx"),
        PASSES,
        example_inputs=FEEDS,
        calibration=[FEEDS],
        target="portable",
        check="contract",
        instruments=[LatencyAfterEachPass([FEEDS], repeats=4)],
    )
    compiled.save(folder / "small.onnx")
    (folder / "report.json").write_text(json.dumps(compiled.report.as_dict()))
    return folder


@pytest.fixture(scope="module")
def content(folder) -> Content:
    path = folder / "small.onnx"
    bound, _ = read_saved(path)
    provenance = Provenance.read(bound.model.metadata_props)
    return Content(
        name=path.name,
        file_bytes=path.stat().st_size,
        file_bytes_before=None,
        provenance=provenance,
        costs=provenance.report,
        measurements=None,
        source_name="SOURCE.onnx",
    )


class Page(html.parser.HTMLParser):
    """Tags with their attributes, all text, and whether every tag that was opened is closed."""

    VOID = frozenset({"meta", "link", "input", "br", "wbr", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def test_the_file_says_how_its_layers_are_stored_and_what_that_cost(content):
    after, before = content.provenance.after, content.provenance.before
    assert [block.name for block in after.blocks] == [*(f"model.layers.{i}" for i in range(3)), "lm_head"]
    assert [block.kind for block in before.blocks] == ["feed-forward"] * 3 + ["other"]
    up = after.blocks[0].layers[0]
    assert (up.name, up.shape, up.bits) == ("model.layers.0.up", (WIDTH, INNER), 4)
    assert up.form == "int4, groups of 32"
    assert up.stored_bytes == WIDTH * INNER // 2 + WIDTH // 32 * INNER * 4
    assert 0 < up.zeros < 0.5
    assert [layer.bits for layer in before.layers] == [32] * 7
    errors = content.passes[-1]["layers"]
    assert errors.keys() == {layer.name for layer in after.layers} - {"lm_head"}
    assert all(0 < error["output"] < error["weight"] < 0.2 for error in errors.values())


def test_the_page_is_whole_and_has_every_section(content):
    page = Page(render(content))
    for word in ("Passes", "Graph", "Layers", "Recipe", "Remarks", "model.layers.0…2", "× 3", "portable"):
        assert word in page.text
    assert "planish compile SOURCE.onnx -o small.onnx --passes" in page.text
    assert "algorithm: gptq" in page.text
    assert "Latency by layer" not in page.text
    assert "Pareto front" not in page.text
    charts = [attributes for tag, attributes in page.tags if attributes.get("class") == "chart"]
    assert [chart["aria-label"].partition(":")[0] for chart in charts] == [
        "bits of a weight",
        "weights that are zero",
        "error of the weights, ‖W − Ŵ‖ / ‖W‖",
        "error of the output, ‖X(W − Ŵ)‖ / ‖XW‖",
    ]


def test_the_page_asks_for_nothing_from_elsewhere_and_can_be_read_aloud(content):
    page = Page(render(content))
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "xlink:href"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert not any(name.startswith("on") for name in attributes)
        assert tag not in {"iframe", "object", "embed", "img"}
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in {"row", "col"}
    assert "url(" not in render(content)
    policy = next(attributes["content"] for _, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'")


def test_names_from_a_model_stay_text(tmp_path):
    """Layer names, reasons and recipes come from files that anyone may have made."""
    path = tmp_path / f"a{HOSTILE.replace('/', '|')}.onnx"
    ignored = f"{HOSTILE}.layers.0.up"
    passes = [
        {"canonicalize": {}},
        {"quantize": {"scheme": "W8A16", "ignore": [ignored], "config_groups": {}}},
    ]
    model = write_model(tmp_path / "model.onnx", prefix=HOSTILE)
    planish.compile(model, passes, target="portable").save(path)
    bound, _ = read_saved(path)
    provenance = Provenance.read(bound.model.metadata_props)
    point = ParetoPoint(label=HOSTILE, size=1e6, latency_ms=None, metric=1.0, chosen=True)
    provenance = dataclasses.replace(
        provenance, pareto=(point, point), versions={HOSTILE: HOSTILE}, recipe=f"- {HOSTILE}"
    )
    content = Content(
        name=path.name,
        file_bytes=1,
        file_bytes_before=None,
        provenance=provenance,
        costs=provenance.report,
        measurements=measure(path, bound, provenance.after, before=model, feeds=FEEDS, latency=True),
        source_name=HOSTILE,
    )
    text = render(content)
    assert text.count("<script>") == 1  # the page's own
    page = Page(text)
    assert "alert" in page.text
    assert f"{ignored} not quantised: ignored" in page.text
    if browser.CHROMIUM is not None:
        (tmp_path / "report.html").write_text(text)
        seen = browser.visit(tmp_path / "report.html", tmp_path / "report.png")
        assert seen.console == ()


def test_measurements_bring_latency_errors_and_the_time_of_every_layer(folder, content):
    bound, _ = read_saved(folder / "small.onnx")
    measured = measure(
        folder / "small.onnx",
        bound,
        content.provenance.after,
        before=folder / "model.onnx",
        feeds=FEEDS,
        latency=True,
    )
    assert {time.name for time in measured.layers if time.is_layer} == {
        layer.name for layer in content.provenance.after.layers
    }
    assert measured.errors["logits"].cosine_min == pytest.approx(0.99, abs=0.02)
    costs = json.loads((folder / "report.json").read_text())
    rich = dataclasses.replace(content, measurements=measured, file_bytes_before=10**6, costs=costs)
    page = Page(render(rich))
    assert "Latency by layer" in page.text
    assert "times as fast, on this machine" in page.text
    assert "x [16, 64]" in page.text
    headings = "".join(page.texts)
    assert all(word in headings for word in ("latency", "time", "memory", "cosine"))


def test_a_pareto_front_is_drawn_where_a_search_left_one(content):
    points = tuple(
        ParetoPoint(label=label, size=size, latency_ms=ms, metric=metric, chosen=label == "W4")
        for label, size, ms, metric in (("W2", 1e6, 1.0, 0.5), ("W4", 2e6, 2.0, 0.9), ("W8", 4e6, 4.5, 1.0))
    )
    page = Page(
        render(
            dataclasses.replace(content, provenance=dataclasses.replace(content.provenance, pareto=points))
        )
    )
    assert "W4 (this file)" in page.text
    assert [attributes["class"] for tag, attributes in page.tags if tag == "g"][-3:] == [
        "point",
        "point chosen",
        "point",
    ]
    untimed = tuple(dataclasses.replace(point, latency_ms=None) for point in points)
    assert "size, MB" in pareto(untimed, "metric")
    assert "latency, ms" in pareto(points, "metric")
    assert "circle" in pareto(points[:1], "metric")


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize(
    ("width", "dark"), [(1120, False), (1120, True), (390, False)], ids=["light", "dark", "phone"]
)
def test_a_browser_shows_it_without_a_word_or_a_request(content, tmp_path, width, dark):
    (tmp_path / "report.html").write_text(render(content), encoding="utf-8")
    picture = tmp_path / "report.png"
    seen = browser.visit(tmp_path / "report.html", picture, width=width, dark=dark)
    assert seen.console == ()
    assert seen.requests == set()
    corner, colours = _look(picture)
    assert (max(corner) < 60) if dark else (min(corner) > 200)
    assert colours > 100  # text and charts, not an empty page


@pytest.mark.skipif(browser.CHROMIUM is None, reason="there is no Chromium on this machine")
def test_what_the_browser_is_asked_would_be_noticed(tmp_path):
    """The twin of the test above: a page that does complain and does ask."""
    (tmp_path / "bad.html").write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("boom")</script>'
    )
    seen = browser.visit(tmp_path / "bad.html", tmp_path / "bad.png")
    assert any("boom" in line for line in seen.console)
    assert seen.requests == {"http://127.0.0.1:9/x.png"}


def _look(picture: Path) -> tuple[tuple[int, ...], int]:
    """The colour of the upper left corner, and how many colours there are."""
    image = pytest.importorskip("PIL.Image").open(picture).convert("RGB")
    return image.getpixel((2, 2)), len(image.getcolors(maxcolors=image.width * image.height))


def layer(name: str, *, bits: int = 4, width: int = 8) -> LayerOutline:
    return LayerOutline(
        name=name, node=name, kind="linear", shape=(8, width), form=f"int{bits}", bits=bits,
        activation_bits=None, stored_bytes=32, zeros=None,
    )  # fmt: skip


def model_of(*names: str, bits: int = 4) -> ModelOutline:
    return ModelOutline(
        blocks=tuple(
            BlockOutline(name=name, kind="feed-forward", ops={}, layers=(layer(f"{name}.up", bits=bits),))
            for name in names
        ),
        weight_bytes=1,
    )


def rows(before: ModelOutline, after: ModelOutline) -> list[list[tuple[str, int]]]:
    return [[(row.name, row.count) for row in group] for group in block_rows(before, after, {})]


def test_blocks_that_repeat_are_folded_with_their_period():
    names = ["embed", *(f"layers.{index}.{part}" for index in range(4) for part in ("attn", "mlp"))]
    model = model_of(*names)
    kinds = tuple(
        dataclasses.replace(block, kind="attention" if block.name.endswith("attn") else block.kind)
        for block in model.blocks
    )
    model = dataclasses.replace(model, blocks=(dataclasses.replace(kinds[0], kind="embedding"), *kinds[1:]))
    assert rows(model, model) == [[("embed", 1)], [("layers.0…3.attn", 4), ("layers.0…3.mlp", 4)]]


def test_blocks_that_differ_or_are_gone_stand_alone():
    before = model_of("layers.0", "layers.1", "layers.2")
    mixed = dataclasses.replace(
        before,
        blocks=(*before.blocks[:2], dataclasses.replace(before.blocks[2], layers=(layer("x", bits=8),))),
    )
    assert rows(before, mixed) == [[("layers.0…1", 2)], [("layers.2", 1)]]
    after = model_of("layers.0", "layers.2")
    assert [len(group) for group in block_rows(before, after, {})] == [1, 1, 1]
    gone = block_rows(before, after, {})[1][0]
    assert (gone.name, gone.pair.after) == ("layers.1", None)


@pytest.mark.parametrize(
    ("largest", "top"), [(0.0, 1.0), (0.021, 0.04), (0.2, 0.2), (1.0, 1.0), (7.0, 10.0), (32.0, 40.0)]
)
def test_ticks_are_round_and_reach_above_the_largest(largest, top):
    heights = [height for height, _ in rising_ticks(largest)]
    assert heights[0] == 0
    assert heights[-1] == pytest.approx(top)


def test_charts_leave_out_what_is_not_known():
    data = [
        Column("a", 1.0, "1", "other"),
        Column("b", None, "not known", "other"),
        Column("c", 0.0, "0", "other"),
    ]
    svg = columns("title", data, [(0.0, "0"), (1.0, "1")])
    assert svg.count('class="column"') == 3
    assert svg.count('class="fill-other"') == 2
    assert 'aria-label="title: from 0 (c) to 1 (a)"' in svg
