"""Opset conversion: onnxruntime runs the old model and the converted one, and they agree."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import defs
from planish.ir import load, save, verify
from planish.ir.load import REMARKS_KEY
from planish.ir.opset import ADAPTERS, OLDEST_OPSET, OPSET, WITHOUT_KERNEL

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)


def header(opset: int) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]>'


def run(model: onnx.ModelProto | Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSumSquare"
)
CASES = {
    **{
        f"{op} {attributes}": (
            13,
            f"(float[2, 4, 6, 6] x) => (float[a, b, c, d] y) {{ y = {op} {attributes}(x) }}",
        )
        for op in REDUCTIONS.split()
        for attributes in ("<axes = [1, -1]>", "<axes = [2], keepdims = 1>", "")
        if op != "ReduceLogSum" or attributes == ""
    },
    "split": (
        13,
        "(float[2, 4, 6, 6] x) => (float[2, 2, 6, 6] y, float[2, 2, 6, 6] z) { y, z = Split <axis = 1>(x) }",
    ),
    "split into given parts": (
        13,
        """(float[2, 4, 6, 6] x) => (float[2, 1, 6, 6] y, float[2, 3, 6, 6] z)
        <int64[2] parts = {1, 3}> { y, z = Split <axis = 1>(x, parts) }""",
    ),
    "split in a branch": (
        15,
        """(float[2, 4, 6, 6] x) => (float[2, 2, 6, 6] y) <bool c = {1}> {
          y = If (c) <
            then_branch: graph = t () => (float[2, 2, 6, 6] a) { a, unused = Split <axis = 1>(x) },
            else_branch: graph = e () => (float[2, 2, 6, 6] b) { other, b = Split <axis = 1>(x) }>
        }""",
    ),
    "batch normalisation": (
        13,
        """(float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y)
        <float[4] s = {1, 2, 3, 4}, float[4] b = {0, 1, 0, 1},
         float[4] m = {0, 1, 2, 3}, float[4] v = {1, 2, 1, 2}>
        { y = BatchNormalization(x, s, b, m, v) }""",
    ),
    **{
        f"grid sample {mode}": (
            16,
            f"""(float[2, 4, 6, 6] x) => (float[2, 4, 2, 1] y)
            <float[4, 2] points = {{-0.9, -0.5, 0.1, 0.2, 0.7, 0.3, 0.9, 1}}, int64[4] shape = {{2, 2, 1, 2}}>
            {{ g = Reshape(points, shape)  y = GridSample {mode}(x, g) }}""",
        )
        for mode in ("", '<mode = "bilinear">', '<mode = "bicubic">', '<mode = "nearest">')
    },
    **{
        f"Fourier transform {axis}": (
            17,
            f"""(float[2, 4, 6, 6] x) => (float[n, a, b, 2] y) <int64[4] shape = {{4, 12, 6, 1}}>
            {{ s = Reshape(x, shape)  y = DFT {axis}(s) }}""",
        )
        for axis in ("", "<axis = 2>")
    },
}


@pytest.mark.parametrize("name", CASES)
def test_converted_models_compute_the_same(name: str, tmp_path: Path) -> None:
    opset, text = CASES[name]
    before = onnx.parser.parse_model(f"{header(opset)} g {text}")
    feeds = {"x": np.abs(IMAGE) if "Log" in name else IMAGE}
    model = load(before)
    assert model.opset_imports[""] == OPSET
    assert REMARKS_KEY not in model.meta
    verify(model)
    save(model, tmp_path / "m.onnx")
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    for old, new in zip(run(before, feeds), run(tmp_path / "m.onnx", feeds), strict=True):
        # The same kernels on the same numbers; only the way their operands are spelled has changed.
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)


def test_group_normalisation_gets_a_scale_per_channel(tmp_path: Path) -> None:
    """Not run in its old form: onnxruntime has no kernel for opset 18; the reference is numpy."""
    text = """g (float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y) <float[2] s = {2, 3}, float[2] b = {0, 1}>
    { y = GroupNormalization <num_groups = 2, epsilon = 0.001>(x, s, b) }"""
    save(load(onnx.parser.parse_model(header(18) + text)), tmp_path / "m.onnx")
    groups = IMAGE.astype(np.float64).reshape(2, 2, 2, 6, 6)
    mean = groups.mean((2, 3, 4), keepdims=True)
    variance = groups.var((2, 3, 4), keepdims=True)
    shape = (1, 2, 1, 1, 1)
    scale, bias = np.array([2, 3]).reshape(shape), np.array([0, 1]).reshape(shape)
    expected = ((groups - mean) / np.sqrt(variance + 0.001) * scale + bias).reshape(IMAGE.shape)
    # float32 against float64: sums of 72 numbers of order one
    np.testing.assert_allclose(run(tmp_path / "m.onnx", {"x": IMAGE})[0], expected, atol=1e-5)


def test_functions_are_converted_at_their_own_opset(tmp_path: Path) -> None:
    text = (
        header(17).replace("]>", ', "local" : 1]>')
        + """
    g (float[2, 4, 6, 6] x) => (float[2, 1, 6, 6] y) { y = local.Mean(x) }
    <domain: "local", opset_import: ["" : 13]>
    Mean (v) => (r) { r = ReduceMean <axes = [1]>(v) }"""
    )
    before = onnx.parser.parse_model(text)
    model = load(before)
    (function,) = model.functions.values()
    assert function.opset_imports[""] == OPSET
    verify(model)
    save(model, tmp_path / "m.onnx")
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", {"x": IMAGE})[0], run(before, {"x": IMAGE})[0])


def test_other_domains_are_left_alone() -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
        + """
    g (float[2, 4] x) => (float[2, 4] y) { y = com.microsoft.Gelu(x) }"""
    )
    model = load(onnx.parser.parse_model(text))
    assert dict(model.opset_imports) == {"": OPSET, "com.microsoft": 1}
    assert model.graph[0].op_identifier() == ("com.microsoft", "Gelu", "")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = ReduceMean <axes: ints = @axes>(v)", "takes its 'axes' from the function around it"),
        ("r = Vanished(v)", "is not an op of opset 23"),
    ],
)
def test_what_cannot_be_converted_is_kept_whole(body: str, reason: str) -> None:
    text = (
        header(17).replace("]>", ', "local" : 1]>')
        + f"""
    g (float[2, 4] x) => (float[a, b] y) {{ s = ReduceMax <axes = [1]>(x)  y = local.F <axes = [1]>(s) }}
    <domain: "local", opset_import: ["" : 17]>
    F <axes> (v) => (r) {{ {body} }}"""
    )
    model = load(onnx.parser.parse_model(text))
    assert model.opset_imports[""] == 17
    assert "axes" in model.graph[0].attributes
    (remark,) = model.meta[REMARKS_KEY]
    assert "kept at opset 17" in remark
    assert reason in remark


def test_training_mode_batch_normalisation_is_kept() -> None:
    text = (
        header(13)
        + """g (float[2, 4] x, float[4] s) => (float[2, 4] y, float[4] m)
    { y, m, v, p, q = BatchNormalization(x, s, s, s, s) }"""
    )
    model = load(onnx.parser.parse_model(text))
    assert model.opset_imports[""] == 13
    assert "training mode" in model.meta[REMARKS_KEY][0]


def test_newer_opsets_are_kept_without_a_remark() -> None:
    model = load(onnx.parser.parse_model(header(24) + "g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    assert model.opset_imports[""] == 24
    assert REMARKS_KEY not in model.meta


def _spelling(schema: defs.OpSchema) -> tuple[object, ...]:
    """What a node written for this version relies on: attributes with their defaults, and its operands."""
    attributes = {
        name: (attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in schema.attributes.items()
    }
    return attributes, [value.option for value in schema.inputs], [value.option for value in schema.outputs]


def _is_compatible(old: defs.OpSchema, new: defs.OpSchema) -> bool:
    before, after = _spelling(old), _spelling(new)
    attributes_before, attributes_after = before[0], after[0]
    assert isinstance(attributes_before, dict)
    assert isinstance(attributes_after, dict)
    added = [attributes_after[name] for name in attributes_after if name not in attributes_before]
    same = all(attributes_after.get(name) == value for name, value in attributes_before.items())
    optional = all(not required for _, required, _ in added)
    operands = [
        v.option == defs.OpSchema.FormalParameterOption.Optional for v in new.inputs[len(old.inputs) :]
    ]
    return same and optional and all(operands) and len(new.outputs) >= len(old.outputs) and not new.deprecated


KNOWN_BY_MEANING = {
    "Split": "without parts, num_outputs must be given; the schema calls it optional",
    "GroupNormalization": "the operands' lengths changed, which schemas do not tell",
}


def test_every_op_that_changed_has_an_adapter() -> None:
    """Compare the schemas of all versions: what changed incompatibly is exactly what the adapters list."""
    versions: dict[str, list[defs.OpSchema]] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= OPSET:
            versions.setdefault(schema.name, []).append(schema)
    changed = set()
    for name, schemas in versions.items():
        schemas.sort(key=lambda schema: schema.since_version)
        for old, new in itertools.pairwise(schemas):
            if new.since_version <= OLDEST_OPSET or name in WITHOUT_KERNEL:
                continue
            if not _is_compatible(old, new):
                changed.add((name, new.since_version))
    adapted = {(op, adapter.since) for adapter in ADAPTERS for op in adapter.op_types}
    assert {entry for entry in adapted if entry[0] not in KNOWN_BY_MEANING} == changed
    assert {op for op, _ in adapted} >= set(KNOWN_BY_MEANING)


def test_ops_without_kernel_are_those_of_this_onnxruntime() -> None:
    """Ops that have a kernel for some opset from 13 to 21, but none for their newest form up to opset 23."""
    kernels: dict[str, list[tuple[int, int]]] = {}
    for kernel in onnxruntime.capi.onnxruntime_pybind11_state.get_all_opkernel_def():
        if kernel.domain == "" and kernel.provider == "CPUExecutionProvider":
            kernels.setdefault(kernel.op_name, []).append(kernel.version_range)
    versions: dict[str, list[int]] = {}
    for schema in defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version <= OPSET:
            versions.setdefault(schema.name, []).append(schema.since_version)

    def runs(name: str, version: int) -> bool:
        # An open range only serves the version that it starts with.
        return any(
            version == first or (first <= version <= last < 2**31 - 1)
            for first, last in kernels.get(name, [])
        )

    lost = set()
    for name, known in versions.items():
        newest = max(known)
        oldest = max(version for version in known if version <= OLDEST_OPSET or version == min(known))
        convertible = [version for version in known if oldest <= version < newest]
        inlined = defs.get_schema(name, OPSET, "").has_function
        if not inlined and not runs(name, newest) and any(runs(name, v) for v in convertible):
            lost.add(name)
    assert lost == WITHOUT_KERNEL


def test_models_that_would_lose_their_kernel_are_kept(tmp_path: Path) -> None:
    text = """g (float[2, 4, 6, 6] x, float[2, 4] r) => (float[2, 4, 2, 2] y) <int64[2] i = {0, 1}>
    { y = RoiAlign <output_height = 2, output_width = 2>(x, r, i) }"""
    before = onnx.parser.parse_model(header(16) + text)
    model = load(before)
    assert "RoiAlign '' has no kernel in onnxruntime" in model.meta[REMARKS_KEY][0]
    save(model, tmp_path / "m.onnx")
    feeds = {"x": IMAGE, "r": np.array([[0.4, 0.3, 3.7, 4.2], [1, 1, 5, 5]], np.float32)}
    np.testing.assert_array_equal(run(tmp_path / "m.onnx", feeds)[0], run(before, feeds)[0])
