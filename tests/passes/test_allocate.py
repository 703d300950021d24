"""Allocation: the integer program against all assignments, measured losses, budgets, groups, metadata."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.codegen import get_target, microbenchmark
from planish.codegen.portable import Portable
from planish.ir.errors import InputError, PassError, PipelineError, TargetError
from planish.passes.allocate import Allocate
from planish.passes.allocate.program import Budget, choose
from planish.passes.infrastructure.base import PassContext
from planish.passes.quantize import Quantize
from planish.runtime.sensitivity import WeightSensitivity, first_samples

K, HIDDEN, VOCABULARY = 32, 48, 10


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(body, outputs, weights, inputs=f"float[batch, sequence, {K}] x"):
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 23]>\ng ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    return ir.from_proto(proto)


WEIGHTS = {
    "q": random(K, HIDDEN, seed=1) / K**0.5,
    "k": random(K, HIDDEN, seed=2) / K**0.5 * np.exp(random(K, 1, seed=3)),
    "down": random(HIDDEN, K, seed=4) / HIDDEN**0.5,
    "head": random(K, VOCABULARY, seed=5) / K**0.5,
}


def decoder(output="logits"):
    """Two linears that share an input, and two behind them."""
    return model_of(
        "a = MatMul (x, q) b = MatMul (x, k) s = Sigmoid (a) h = Mul (s, b) d = MatMul (h, down)"
        f" y = Add (x, d) {output} = MatMul (y, head)",
        f"float[batch, sequence, {VOCABULARY}] {output}",
        WEIGHTS,
    )


SAMPLES = [{"x": random(2, 5, K, seed=seed)} for seed in (10, 11)]


def reference_outputs(x, weights):
    """The decoder in float64."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    x = x.astype(np.float64)
    h = x @ w["k"] / (1 + np.exp(-(x @ w["q"])))
    return (x + h @ w["down"]) @ w["head"]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def rounded(weight, bits, group_size):
    """Symmetric rounding on the grid max / (2^(bits−1) − 1), written anew."""
    groups = weight.astype(np.float64).reshape(
        -1, group_size if group_size > 0 else len(weight), weight.shape[1]
    )
    step = np.abs(groups).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    return (np.rint(groups / step) * step).reshape(weight.shape)


def divergence(changed):
    """Mean KL of the decoder's logits over all samples' tokens, with ``changed`` weights."""
    values = []
    for sample in SAMPLES:
        p, q = (
            log_softmax(reference_outputs(sample["x"], weights)) for weights in (WEIGHTS, WEIGHTS | changed)
        )
        values.append((np.exp(p) * (p - q)).sum(-1).reshape(-1))
    return float(np.concatenate(values).mean())


class Timed(Portable):
    """A target whose linears take a microsecond for each bit of a weight and 100 features of the output."""

    def seconds(self, node):
        bits = node.attributes["bits"].as_int() if node.domain == "planish" else 32
        return bits * node.inputs[1].shape[1] * 1e-8


def allocate(model, samples=SAMPLES, target=None, **options):
    ctx = PassContext(target=target or get_target("portable"), calibration=samples)
    options = {"clip": False, "ignore": ()} | options
    result = Allocate(**options).run(model, ctx)
    schemes = {
        node.inputs[1].name: node.metadata_props.get("planish.scheme")
        for node in model.graph
        if node.op_type == "MatMul"
    }
    return result, schemes, ctx


def brute_force(groups, candidates, budget):
    """The best of all assignments: (loss, schemes). ``budget`` says what one may use, by its texts."""
    best = (math.inf, None)
    losses = {}
    for group, (bits, group_size) in itertools.product(groups, candidates):
        changed = {name: rounded(WEIGHTS[name], bits, group_size) for name in group if bits < 32}
        losses[group, bits] = divergence(changed)
    for choice in itertools.product(candidates, repeat=len(groups)):
        loss = sum(losses[group, bits] for group, (bits, _) in zip(groups, choice, strict=True))
        chosen = {name: spec for group, spec in zip(groups, choice, strict=True) for name in group}
        if budget(chosen) and loss < best[0]:
            best = (loss, chosen)
    return best


def bits_of(name, bits, group_size):
    rows, columns = WEIGHTS[name].shape
    groups = columns * (rows // group_size if group_size > 0 else 1)
    return rows * columns * bits + (groups * 32 if bits < 32 else 0)


def text_of(bits, group_size):
    return "dense" if bits == 32 else f"W{bits}A16 group_size={group_size}"


SPECS = [(2, 16), (3, -1), (4, 16), (8, -1), (32, 0)]
CANDIDATES = tuple(text_of(*spec) for spec in SPECS)
TOGETHER = [("q", "k"), ("down",), ("head",)]
APART = [("q",), ("k",), ("down",), ("head",)]


@pytest.mark.parametrize("groups", [TOGETHER, APART], ids=["together", "apart"])
@pytest.mark.parametrize("limit", [4.5, 5.5, 7.0, 10.0, 32.0])
def test_the_best_of_all_assignments_under_a_budget_of_bits(limit, groups):
    weights = sum(array.size for array in WEIGHTS.values())

    def within(chosen):
        return sum(bits_of(name, *spec) for name, spec in chosen.items()) <= limit * weights

    loss, expected = brute_force(groups, SPECS, within)
    _, schemes, ctx = allocate(
        decoder(), candidates=CANDIDATES, bits_per_weight=limit, together=groups is TOGETHER
    )
    assert schemes == {name: text_of(*spec) for name, spec in expected.items()}
    total = ctx.remarks[-1]
    # Losses are measured in float32, and printed with three digits.
    assert float(total.text.split("estimated loss ")[1].split(",")[0]) == pytest.approx(
        loss, rel=2e-2, abs=1e-9
    )


def test_bytes_are_those_of_the_containers():
    """3 bits take as much room in a file as 4, so they are never worth it under a budget of bytes."""
    candidates = ("W3A16 group_size=16", "W4A16 group_size=16", "dense")
    stored = sum(bits_of(name, 4, 16) // 8 for name in WEIGHTS)
    _, schemes, ctx = allocate(decoder(), candidates=candidates, bytes=stored)
    assert set(schemes.values()) == {"W4A16 group_size=16"}
    assert f"{stored} bytes" in ctx.remarks[-1].text


def test_code_books_are_candidates_too():
    elements = WEIGHTS["head"].size
    _, schemes, ctx = allocate(
        decoder(), candidates=("NF4", "dense"), group_size=16, bytes=elements, targets=("head",)
    )
    assert schemes["head"] == "NF4 group_size=16"
    # 4 bits a weight, a float32 scale for 16 of them, 16 points of the book.
    assert f"{elements // 2 + elements // 16 * 4 + 16 * 4} bytes" in ctx.remarks[-1].text


def test_a_largest_loss_with_the_least_bits():
    least, expected = math.inf, None
    candidates = [(3, -1), (8, -1), (32, 0)]
    limit = 2e-2
    losses = {
        (name, bits): divergence({name: rounded(WEIGHTS[name], bits, size)} if bits < 32 else {})
        for name in WEIGHTS
        for bits, size in candidates
    }
    for choice in itertools.product(candidates, repeat=4):
        chosen = dict(zip(WEIGHTS, choice, strict=True))
        bits = sum(bits_of(name, *spec) for name, spec in chosen.items())
        if sum(losses[name, spec[0]] for name, spec in chosen.items()) <= limit and bits < least:
            least, expected = bits, chosen
    _, schemes, _ = allocate(
        decoder(), candidates=tuple(text_of(*spec) for spec in candidates), loss=limit, together=False
    )
    assert len(set(schemes.values())) > 1  # or the budget would decide nothing
    assert schemes == {name: text_of(*spec) for name, spec in expected.items()}


@pytest.mark.parametrize(("reference", "width"), [("dense", 32), ("W8A16", 8)])
def test_latency_is_relative_to_a_reference(reference, width):
    columns = sum(array.shape[1] for array in WEIGHTS.values())
    limit = 6.0 * columns

    def within(chosen):
        return sum(WEIGHTS[name].shape[1] * bits for name, (bits, _) in chosen.items()) <= limit

    _, expected = brute_force(APART, SPECS, within)
    _, schemes, ctx = allocate(
        decoder(),
        target=Timed(),
        candidates=CANDIDATES,
        latency=limit / columns / width,
        latency_of=reference,
        together=False,
    )
    assert schemes == {name: text_of(*spec) for name, spec in expected.items()}
    assert "of the reference" in ctx.remarks[-1].text


def test_times_are_those_of_the_kernels_that_are_bound(tmp_path, monkeypatch):
    """With times made up: kernels for narrow integers take a quarter of what all others take."""
    monkeypatch.setenv("PLANISH_CACHE_DIR", str(tmp_path))
    timed = []

    def seconds(sessions, feeds):
        timed.append(sorted(sessions))
        nbits = [name for name in sessions if "MatMulNBits" in name]
        return {name: 1e-6 if name in nbits else 4e-6 for name in sessions}

    monkeypatch.setattr(microbenchmark, "_seconds", seconds)
    model = model_of(
        "p = MatMul (x, w) h = Add (p, b) y = MatMul (h, v)",
        f"float[batch, sequence, {K}] y",
        {"w": random(K, K), "b": random(K), "v": random(K, K)},
    )
    _, schemes, ctx = allocate(
        model,
        target=get_target("onnxruntime-cpu", rows=(1,)),
        candidates=("W4A16 group_size=16", "W3A16_ASYM group_size=32", "dense"),
        latency=0.7,
    )
    assert sorted(schemes.values(), key=len)[0] == "dense"
    assert len(set(schemes.values())) == 2
    assert "5 µs: 0.625 of the reference" in ctx.remarks[-1].text
    # Three of a kind with a bias and three without; ``dense`` is also the reference and measured once.
    assert len(timed) == 6


def test_several_budgets_hold_at_once():
    weights = sum(array.size for array in WEIGHTS.values())
    columns = sum(array.shape[1] for array in WEIGHTS.values())

    def within(chosen):
        bits = sum(bits_of(name, *spec) for name, spec in chosen.items())
        slow = sum(WEIGHTS[name].shape[1] * spec[0] for name, spec in chosen.items())
        return bits <= 9 * weights and slow <= 5 * columns

    _, expected = brute_force(APART, SPECS, within)
    _, schemes, _ = allocate(
        decoder(), target=Timed(), candidates=CANDIDATES, bits_per_weight=9.0, latency=5 / 32, together=False
    )
    assert schemes == {name: text_of(*spec) for name, spec in expected.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": 3.0}, r"keeps bits_per_weight=3; .* is bits_per_weight=(\S+)$"),
        ({"bytes": 100}, r"keeps bytes=100; .* is bytes=(\S+)$"),
        ({"latency": 0.01}, r"keeps latency=0.01; .* is latency=(\S+)$"),
        ({"loss": 1e-30, "candidates": ("W8A16",)}, r"keeps loss=1e-30; .* is loss=(\S+)$"),
    ],
)
def test_a_budget_that_cannot_be_kept(options, message):
    candidates = {"candidates": ("W2A16 group_size=16", "W4A16 group_size=16")}
    with pytest.raises(PassError, match=message) as caught:
        allocate(decoder(), target=Timed(), **(candidates | options))
    # What the message says can be reached is reached.
    name = next(iter(options))
    least = float(str(caught.value).rpartition("=")[2])
    reachable = candidates | options | {name: math.ceil(least) if name == "bytes" else least}
    _, schemes, _ = allocate(decoder(), target=Timed(), **reachable)
    assert len(set(schemes.values())) == 1


def test_budgets_that_exclude_each_other():
    candidates = ("W2A16 group_size=16", "W8A16")
    with pytest.raises(PassError, match=r"bits_per_weight=5 and loss=0\.001 together; .* raise one of them"):
        allocate(decoder(), candidates=candidates, bits_per_weight=5.0, loss=1e-3)


def test_layers_that_read_one_input_get_one_scheme():
    for limit in (4.5, 5.5, 6.5, 8.0):
        _, schemes, _ = allocate(decoder(), candidates=CANDIDATES, bits_per_weight=limit)
        assert schemes["q"] == schemes["k"]
    _, apart, _ = allocate(decoder(), candidates=CANDIDATES, bits_per_weight=8.0, together=False)
    assert apart["q"] != apart["k"]


def test_quantize_obeys():
    model = decoder()
    _, schemes, _ = allocate(model, candidates=CANDIDATES, bits_per_weight=6.0)
    Quantize(scheme="W8A16", ignore=()).run(model, PassContext(target=get_target("portable")))
    quantised = [node for node in model.graph if node.op_type == "QuantizedLinear"]
    expected = [text for text in schemes.values() if text != "dense"]
    found = [f"W{node.attributes['bits'].as_int()}A16" for node in quantised]
    assert found == [text.split()[0] for text in expected]
    assert expected


def test_the_graph_keeps_its_function():
    model = decoder()
    before = ir.to_proto(model).graph.SerializeToString()
    result, _, _ = allocate(model, candidates=CANDIDATES, bits_per_weight=6.0)
    assert result.modified
    assert str(result.coverage) == "4 of 4 linears"
    assert sum(result.statistics.values()) == 4
    for node in model.graph:
        node.metadata_props.pop("planish.scheme", None)
    assert ir.to_proto(model).graph.SerializeToString() == before


def test_every_layer_says_what_it_got():
    _, schemes, ctx = allocate(
        decoder(), target=Timed(), candidates=CANDIDATES, bits_per_weight=6.0, latency=1.0
    )
    remarks = {remark.subject: remark.text for remark in ctx.remarks}
    assert remarks["q, k"].startswith(schemes["q"] + ": estimated loss ")
    assert remarks["down"].startswith(schemes["down"])
    assert all("bytes" in text and "µs" in text for text in remarks.values())


def test_layers_that_cannot_be_decided_about():
    model = model_of(
        "a = MatMul (x, w) y = MatMul (a, v) z = MatMul (y, lm_head)",
        f"float[batch, sequence, {VOCABULARY}] z",
        {"w": random(K, 24), "v": random(24, K), "lm_head": random(K, VOCABULARY)},
    )
    result, schemes, ctx = allocate(
        model, candidates=("W4A16 group_size=32", "dense"), bits_per_weight=8.0, ignore=("lm_head",)
    )
    assert schemes == {"w": "W4A16 group_size=32", "v": None, "lm_head": None}
    reasons = {skip.name: skip.reason for skip in result.coverage.skipped}
    assert reasons == {"v": "in_features % 32", "lm_head": "ignored"}
    assert any(remark.subject == "v" and "in_features % 32" in remark.text for remark in ctx.remarks)


def test_a_candidate_that_fits_only_some_layers():
    model = model_of(
        "a = MatMul (x, w) y = MatMul (a, v)",
        f"float[batch, sequence, {K}] y",
        {"w": random(K, 24), "v": random(24, K)},
    )
    _, schemes, ctx = allocate(
        model, candidates=("W4A16 group_size=32", "W4A16 group_size=-1"), bits_per_weight=4.0 + 4 / 3
    )
    assert schemes["v"] == "W4A16 group_size=-1"
    assert ("v", "cannot be W4A16 group_size=32: in_features % 32") in [
        (remark.subject, remark.text) for remark in ctx.remarks
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_that_is_stored_transposed(dtype):
    """Gemm with transB, in both float types: the same choice as for the MatMul, with the same loss."""
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    results = []
    for body, weight in (
        ("y = MatMul (x, w)", WEIGHTS["head"]),
        ("y = Gemm <transB = 1> (x, w)", np.ascontiguousarray(WEIGHTS["head"].T)),
    ):
        model = model_of(
            body, f"{kind}[rows, {VOCABULARY}] y", {"w": weight.astype(dtype)}, f"{kind}[rows, {K}] x"
        )
        samples = [{"x": random(7, K).astype(dtype)}]
        _, _, ctx = allocate(model, samples=samples, candidates=("W3A16 group_size=16",), loss=1.0)
        results.append(ctx.remarks[0].text)
        assert model.graph.node(0).metadata_props["planish.scheme"] == "W3A16 group_size=16"
    assert results[0] == results[1]
    changed, exact = (
        samples[0]["x"].astype(np.float64) @ weight
        for weight in (rounded(WEIGHTS["head"].astype(dtype), 3, 16), WEIGHTS["head"].astype(dtype))
    )
    expected = np.square(changed - exact).sum() / np.square(exact).sum()
    # Scales are stored in the float type; float16 has 11 bits.
    assert float(results[0].split("loss ")[1].split(",")[0]) == pytest.approx(expected, rel=2e-2)


def test_targets():
    result, schemes, _ = allocate(
        decoder(), candidates=("W8A16",), bits_per_weight=32.0, targets=("re:[qk]",)
    )
    assert schemes == {"q": "W8A16 group_size=-1", "k": "W8A16 group_size=-1", "down": None, "head": None}
    assert {skip.reason for skip in result.coverage.skipped} == {"not a target"}


def test_nothing_to_decide():
    result, _, _ = allocate(decoder(), bits_per_weight=4.0, ignore=("re:.*",))
    assert (result.modified, result.coverage.covered) == (False, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected a budget"),
        ({"bits_per_weight": -1.0}, "budgets must be positive"),
        ({"loss": math.nan}, "budgets must be positive"),
        ({"loss": 1.0, "candidates": ()}, "expected candidates"),
        ({"loss": 1.0, "candidates": ("int4",)}, "'int4' is not known"),
        ({"loss": 1.0, "candidates": ("W4A16 damp=1",)}, "'W4A16 damp=1' cannot be read"),
        ({"loss": 1.0, "candidates": ("W8A8",)}, "'W8A8' quantises activations"),
        ({"loss": 1.0, "group_size": 100}, "power of two"),
        ({"loss": 1.0, "samples": 0}, "samples must be positive"),
        ({"latency": 1.0, "latency_of": "fast"}, "'fast' is not known"),
    ],
)
def test_bad_options_are_refused_when_the_pass_is_made(options, message):
    with pytest.raises(PipelineError, match=message):
        Allocate(**options)


def test_a_target_that_measures_no_times():
    with pytest.raises(TargetError, match="does not measure times"):
        allocate(decoder(), latency=0.5, candidates=("W8A16", "dense"))


def test_a_scheme_that_the_target_cannot_run_is_refused_before_any_work():
    class Narrow(Portable):
        def unsupported_reason(self, linear):
            return "too few bits" if linear.bits == 2 else None

    with pytest.raises(TargetError, match=r"does not run candidate 'W2A16 group_size=16': too few bits"):
        allocate(decoder(), target=Narrow(), loss=1.0, group_size=16)


def test_examples_stand_in_for_calibration_data():
    model = decoder()
    ctx = PassContext(target=get_target("portable"), examples=SAMPLES[:1])
    Allocate(candidates=("W8A16",), loss=1.0, ignore=()).run(model, ctx)
    assert "planish.scheme" in model.graph.node(0).metadata_props
    with pytest.raises(InputError, match=r"allocate: .* there is none"):
        allocate(decoder(), samples=[], candidates=("W8A16",), loss=1.0)


# --- sensitivities ---------------------------------------------------------------------------------------


def test_losses_of_logits_are_divergences():
    sensitivity = WeightSensitivity(decoder(), ["q", "down"], SAMPLES)
    assert sensitivity.loss({}) == pytest.approx(0, abs=1e-12)
    for name in ("q", "down"):
        changed = {name: rounded(WEIGHTS[name], 3, -1).astype(np.float32)}
        # float32 logits of order 1 differ by 1e-6 from float64 ones, of a divergence of about 1e-2.
        assert sensitivity.loss(changed) == pytest.approx(divergence(changed), rel=1e-3)
    assert sensitivity.loss({}) == pytest.approx(0, abs=1e-12)  # nothing stays changed


def test_other_outputs_are_compared_by_their_squares():
    sensitivity = WeightSensitivity(decoder("features"), ["q"], SAMPLES)
    changed = {"q": rounded(WEIGHTS["q"], 3, -1).astype(np.float32)}
    dense, other = (
        np.concatenate([reference_outputs(sample["x"], weights) for sample in SAMPLES])
        for weights in (WEIGHTS, WEIGHTS | changed)
    )
    expected = np.square(other - dense).sum() / np.square(dense).sum()
    assert sensitivity.loss(changed) == pytest.approx(expected, rel=1e-3)


def test_large_outputs_are_compared_on_some_of_the_tokens(monkeypatch):
    """With room for four tokens of ten, the first, the last and two at equal distances between them count."""
    monkeypatch.setattr("planish.runtime.sensitivity._MOST_REFERENCE_ELEMENTS", 2 * 4 * VOCABULARY + 3)
    changed = {"q": rounded(WEIGHTS["q"], 3, -1).astype(np.float32)}
    found = WeightSensitivity(decoder(), ["q"], SAMPLES).loss(changed)
    values = []
    for sample in SAMPLES:
        p, q = (
            log_softmax(reference_outputs(sample["x"], weights)).reshape(-1, VOCABULARY)[[0, 3, 6, 9]]
            for weights in (WEIGHTS, WEIGHTS | changed)
        )
        values.append((np.exp(p) * (p - q)).sum(-1))
    assert found == pytest.approx(np.mean(values), rel=1e-3)
    assert found != pytest.approx(divergence(changed), rel=1e-2)


def test_padding_does_not_count():
    def padded_model():
        return model_of(
            "m = Cast <to: int = 1> (attention_mask) axes = Constant <value_ints: ints = [2]> ()"
            " n = Unsqueeze (m, axes) logits = MatMul (x, head) unused = Mul (n, n)",
            f"float[b, s, {VOCABULARY}] logits, float[b, s, 1] unused",
            {"head": WEIGHTS["head"]},
            f"float[b, s, {K}] x, int64[b, s] attention_mask",
        )

    x = random(2, 5, K)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    noisy = np.where(mask[..., None], x, 100 * x)
    changed = {"head": rounded(WEIGHTS["head"], 3, -1).astype(np.float32)}
    losses = [
        WeightSensitivity(padded_model(), ["head"], [{"x": array, "attention_mask": mask}]).loss(changed)
        for array in (x, noisy)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    everything = np.ones_like(mask)
    other = WeightSensitivity(padded_model(), ["head"], [{"x": noisy, "attention_mask": everything}])
    assert other.loss(changed) > 2 * losses[0]


def test_a_weight_that_breaks_the_outputs_costs_infinitely_much():
    sensitivity = WeightSensitivity(decoder(), ["q"], SAMPLES)
    assert sensitivity.loss({"q": np.full_like(WEIGHTS["q"], np.nan)}) == math.inf
    with pytest.raises(InputError, match="are not finite"):
        WeightSensitivity(decoder(), ["q"], [{"x": np.full((1, 2, K), np.inf, np.float32)}])


def test_a_broken_weight_is_named():
    model = decoder()
    model.graph.initializers["down"].const_value = ir.tensor(np.full_like(WEIGHTS["down"], np.inf))
    with pytest.raises(InputError, match="weight 'down' holds NaN or infinity"):
        allocate(model, candidates=("W8A16",), loss=1.0)


def reader_of(batch):
    x = ir.val("x", ir.DataType.INT64, [batch])
    return ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}), ir_version=11)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), count=st.integers(1, 12))
def test_the_first_samples(sizes, count):
    ids = iter(range(100))
    data = [{"x": np.array([next(ids) for _ in range(size)])} for size in sizes]
    found = [int(sample) for feeds in first_samples(data, count, reader_of("batch")) for sample in feeds["x"]]
    assert found == list(range(min(count, sum(sizes))))


def test_the_first_samples_of_a_model_that_takes_so_many_at_a_time():
    data = [{"x": np.arange(3)}, {"x": np.arange(3, 6)}, {"x": np.arange(6, 9)}]
    found = [feeds["x"].tolist() for feeds in first_samples(data, 4, reader_of(3))]
    assert found == [[0, 1, 2], [3, 4, 5]]


# --- the integer program ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_the_program_finds_what_enumeration_finds(data, seed):
    rng = np.random.default_rng(seed)
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    # Losses over many orders of magnitude, as measured ones are; sizes as large as those of weights.
    objective = [10.0 ** rng.uniform(-9, 0, count) for count in counts]
    budgets = []
    for unit in data.draw(st.lists(st.sampled_from([1e-6, 1.0, 1e9]), min_size=1, max_size=2)):
        uses = [rng.uniform(0.1, 1, count) * unit for count in counts]
        low, high = (sum(f(use) for use in uses) for f in (min, max))
        budgets.append(Budget("b", float(rng.uniform(0.9 * low, high)), uses))
    best = min(
        (
            (sum(values[i] for values, i in zip(objective, choice, strict=True)), choice)
            for choice in itertools.product(*(range(count) for count in counts))
            if all(
                sum(use[i] for use, i in zip(budget.uses, choice, strict=True)) <= budget.limit
                for budget in budgets
            )
        ),
        default=None,
    )
    found = choose(objective, budgets)
    assert (found is None) == (best is None)
    if best is not None:
        assert tuple(found) == best[1]
