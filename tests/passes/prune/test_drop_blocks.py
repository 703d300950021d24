"""Dropping blocks: which go first by each method, how many a target takes, what is left, and what is refused.

Speed-ups come from a stand-in that counts matrix products, so that no test depends on the machine.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from planish.codegen import get_target
from planish.ir import clone, verify
from planish.ir.diff import diff_models
from planish.ir.errors import InputError, NothingCoveredError, PassError, PipelineError
from planish.ir.structure import ResidualModule, discover, layers_of
from planish.ir.trace import trace
from planish.passes.canonicalize import Canonicalize
from planish.passes.infrastructure.base import Fact, PassContext
from planish.passes.infrastructure.driver import run_pipeline
from planish.passes.infrastructure.facts import set_facts
from planish.passes.infrastructure.pipeline import Pipeline
from planish.passes.prune.deployment import Deployment, Timing
from planish.passes.prune.depth import fewest_reaching
from planish.passes.prune.drop_blocks import DropBlocks
from planish.runtime.calibration import CalibrationData
from planish.runtime.reference import run_model

TARGET = get_target("portable")
WIDTH, INNER = 8, 12


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(body, weights, inputs=f"float[batch, sequence, {WIDTH}] x", outputs=None):
    outputs = outputs or f"float[batch, sequence, {WIDTH}] y"
    proto = onnx.parser.parse_model(
        f'<ir_version: 11, opset_import: ["" : 23]>\ng ({inputs}) => ({outputs}) {{ {body} }}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    set_facts(model, {Fact.CANONICAL})
    return model


def block(number, stream, output):
    return (
        f'a{number} = MatMul ({stream}, "layers.{number}.up.weight") b{number} = Tanh (a{number})'
        f' c{number} = MatMul (b{number}, "layers.{number}.down.weight") {output} = Add ({stream}, c{number})'
    )


def weights_of(number, size=1.0):
    return {
        f"layers.{number}.up.weight": 2 * random(WIDTH, INNER, seed=2 * number),
        f"layers.{number}.down.weight": size * random(INNER, WIDTH, seed=2 * number + 1),
    }


SIZES = (0.4, 0.3, 0.0, 0.5)
WEIGHTS = {
    name: array for number, size in enumerate(SIZES) for name, array in weights_of(number, size).items()
}
STREAM = ("x", "s0", "s1", "s2", "y")
BODY = " ".join(block(number, STREAM[number], STREAM[number + 1]) for number in range(4))
# Tokens on a plane, which every block bends further: all but the useless one add entropy.
SAMPLES = [{"x": random(4, 16, 2, seed=seed) @ random(2, WIDTH, seed=99)} for seed in (100, 101)]


def reference(x, removed=()):
    """The chain of blocks in float64."""
    stream = x.astype(np.float64)
    for number in range(4):
        if number not in removed:
            up, down = (
                WEIGHTS[f"layers.{number}.{part}.weight"].astype(np.float64) for part in ("up", "down")
            )
            stream = stream + np.tanh(stream @ up) @ down
    return stream


def reference_loss(removed):
    errors = [np.square(reference(s["x"], removed) - reference(s["x"])).sum() for s in SAMPLES]
    return sum(errors) / sum(np.square(reference(s["x"])).sum() for s in SAMPLES)


def drop_blocks(model, data=SAMPLES, *, original=None, **options):
    """The result, and what was dropped in its order: name and remark."""
    ctx = PassContext(target=TARGET, calibration=data, original=original)
    options = {"protect": (), "neighbours": 5} | options
    result = DropBlocks(**options).run(model, ctx)
    verify(model)
    return result, [(remark.subject, remark.text) for remark in ctx.remarks if "dropped" in remark.text], ctx


def names(dropped):
    return [name for name, _ in dropped]


@pytest.fixture
def products(monkeypatch):
    """A clock that counts matrix products, and one more for the rest of the model."""
    measured = []

    def seconds(model):
        return 1 + sum(node.op_type == "MatMul" for node in model.graph)

    def measure(self, candidate):
        measured.append(seconds(candidate))
        return Timing(seconds(self._original), seconds(candidate))

    monkeypatch.setattr(Deployment, "measure", measure)
    return measured


@pytest.mark.parametrize("method", ["entropy", "greedy"])
def test_expected_graph(method):
    """Before: four blocks. Expected: the third, which adds zeros, is gone, and so are its weights."""
    before = model_of(BODY, WEIGHTS)
    result, dropped, _ = drop_blocks(before, method=method, count=1)
    expected = model_of(
        " ".join((block(0, "x", "s0"), block(1, "s0", "s1"), block(3, "s1", "y"))),
        {name: array for name, array in WEIGHTS.items() if "layers.2" not in name},
    )
    assert not diff_models(before, expected)
    assert names(dropped) == ["layers.2"]
    assert result.modified
    assert result.statistics == {"dropped ffn": 1}
    assert str(result.coverage) == "4 of 4 residual modules"


def test_the_last_block_can_go():
    """Non-match of the twin above: the output keeps its name though the block that made it is gone."""
    model = model_of(BODY, WEIGHTS)
    drop_blocks(model, count=1, targets=("layers.3",))
    found = run_model(model, SAMPLES[0])["y"]
    np.testing.assert_allclose(found, reference(SAMPLES[0]["x"], {3}), rtol=1e-4, atol=1e-5)  # float32


def test_greedy_order_and_losses_are_those_of_trying_all():
    _, dropped, _ = drop_blocks(model_of(BODY, WEIGHTS), method="greedy", count=4)
    removed = []
    for name, text in dropped:
        left = [number for number in range(4) if number not in removed]
        losses = {number: reference_loss({*removed, number}) for number in left}
        best = min(losses, key=losses.__getitem__)
        assert name == f"layers.{best}"
        found = float(text.split()[2])
        assert found == pytest.approx(losses[best], rel=1e-3, abs=1e-9)  # four digits of float32 outputs
        removed.append(best)
    assert removed[0] == 2


def test_entropy_order_is_that_of_the_gains():
    _, dropped, _ = drop_blocks(model_of(BODY, WEIGHTS), method="entropy", count=4)
    gains = [float(text.split()[3]) for _, text in dropped]
    assert gains == sorted(gains)
    assert dict(zip(names(dropped), gains, strict=True))["layers.2"] == 0.0


def test_entropy_of_a_layer_in_which_tokens_are_joined():
    """Two modules that one layer holds, half as many tokens in the second: each has a gain of its own."""
    first = block(0, "x", "s0")
    second = (
        'p = Reshape (s0, pairs) q = ReduceMean <keepdims = 0> (p, axis) a1 = MatMul (q, "layers.0.v.weight")'
        ' b1 = Tanh (a1) c1 = MatMul (b1, "layers.0.w.weight") y = Add (q, c1)'
    )
    weights = weights_of(0) | {
        "layers.0.v.weight": random(WIDTH, INNER),
        "layers.0.w.weight": random(INNER, WIDTH, seed=1),
        "pairs": np.array([0, -1, 2, WIDTH]),
        "axis": np.array([2]),
    }
    model = model_of(
        f"{first} {second}",
        weights,
        inputs=f"float[batch, 16, {WIDTH}] x",
        outputs=f"float[batch, 8, {WIDTH}] y",
    )
    result, dropped, _ = drop_blocks(model, count=1, unit="layer")
    assert len(dropped) == 1
    assert result.statistics == {"dropped ffn": 2}


def test_samples_limit_what_is_run():
    """The second batch of four holds NaN: it is not run where four samples are enough."""
    broken = [SAMPLES[0], {"x": np.full((4, 16, WIDTH), np.nan, np.float32)}]
    for method in ("entropy", "greedy"):
        _, dropped, _ = drop_blocks(model_of(BODY, WEIGHTS), broken, method=method, count=1, samples=4)
        assert names(dropped) == ["layers.2"]
        with pytest.raises(InputError, match=r"NaN|not finite"):
            drop_blocks(model_of(BODY, WEIGHTS), broken, method=method, count=1, samples=8)


def test_protected_layers_go_last_and_with_a_remark():
    options = {"method": "greedy", "protect": (2, -1)}
    _, dropped, _ = drop_blocks(model_of(BODY, WEIGHTS), count=2, **options)
    assert names(dropped) == ["layers.1", "layers.0"]
    assert not any("protected" in text for _, text in dropped)
    _, dropped, _ = drop_blocks(model_of(BODY, WEIGHTS), count=3, **options)
    assert names(dropped) == ["layers.1", "layers.0", "layers.2"]
    assert ["protected" in text for _, text in dropped] == [False, False, True]


def test_ignored_and_untargeted_modules_stay():
    model = model_of(BODY, WEIGHTS)
    result, dropped, _ = drop_blocks(
        model, count=2, ignore=("layers.2",), targets=("re:layers.[12]", "layers.3")
    )
    assert set(names(dropped)) == {"layers.1", "layers.3"}
    reasons = {skip.name: skip.reason for skip in result.coverage.skipped}
    assert reasons == {"layers.0": "not among targets", "layers.2": "ignored"}
    with pytest.raises(NothingCoveredError, match="0 of 4 residual modules"):
        run_pipeline(model_of(BODY, WEIGHTS), Pipeline.of(DropBlocks(count=1, targets=("z",))), target=TARGET)


def test_sparsity_takes_the_fewest_blocks():
    """Blocks are equally large: half of the weights are two, a bit more are three."""
    for sparsity, count in ((0.5, 2), (0.51, 3), (1.0, 4)):
        _, dropped, ctx = drop_blocks(model_of(BODY, WEIGHTS), sparsity=sparsity)
        assert len(dropped) == count
        assert ctx.remarks[0].text == f"sparsity {count / 4:.4g} for the target {sparsity:g}"


@pytest.mark.parametrize("method", ["entropy", "greedy"])
def test_speedup_takes_the_fewest_blocks(method, products):
    """Nine units of time before, two less with each block: 9/5 needs two blocks, 1.81 needs three."""
    for speedup, count in ((1.8, 2), (1.81, 3)):
        model = model_of(BODY, WEIGHTS)
        _, dropped, ctx = drop_blocks(
            model, original=clone(model), method=method, speedup=speedup, sequence=4, deployed_with=""
        )
        assert len(dropped) == count
        assert dropped[0][0] == "layers.2"
        assert (
            ctx.remarks[0].text == f"measured speed-up {9 / (9 - 2 * count):.3g} for the target {speedup:g}"
        )


def test_speedup_is_relative_to_the_original(products):
    """A model that has lost two blocks before is at 9/5 already."""
    original = model_of(BODY, WEIGHTS)
    model = clone(original)
    drop_blocks(model, count=2)
    result, dropped, ctx = drop_blocks(model, original=original, speedup=1.5, sequence=4, deployed_with="")
    assert not dropped
    assert not result.modified
    assert ctx.remarks[0].text == "measured speed-up 1.8 for the target 1.5"


def test_unreachable_speedup_is_refused_with_the_fastest(products):
    model = model_of(BODY, WEIGHTS)
    with pytest.raises(PassError, match=r"speedup=10 .* all 4 modules .* it is 9 — .* speedup=9$"):
        drop_blocks(model, original=clone(model), speedup=10.0, sequence=4, deployed_with="")
    with pytest.raises(PassError, match=r"speedup=4 .* all 3 modules .* it is 3 — .* speedup=3$"):
        drop_blocks(
            model, original=clone(model), speedup=4.0, sequence=4, deployed_with="", ignore=("layers.0",)
        )
    assert not diff_models(model, model_of(BODY, WEIGHTS))


@pytest.mark.slow
def test_speedup_is_measured_on_a_real_target():
    """Which speed-up it is, is the machine's affair; that without any block it is more than 1 is not."""
    model = model_of(BODY, WEIGHTS)
    _, _, ctx = drop_blocks(model, original=clone(model), speedup=1.0001, sequence=256, batch=2)
    words = ctx.remarks[0].text.split()
    assert words[:2] == ["measured", "speed-up"]
    assert float(words[2]) >= 1.0


def test_impossible_targets_are_refused():
    with pytest.raises(PassError, match="count=5 cannot be reached: 4 modules may go"):
        drop_blocks(model_of(BODY, WEIGHTS), count=5)
    with pytest.raises(PassError, match=r"sparsity=0.8 .* the 3 blocks that may go hold 0.75 of the weights"):
        drop_blocks(model_of(BODY, WEIGHTS), sparsity=0.8, ignore=("layers.0",))
    with pytest.raises(InputError, match="entropy is measured on calibration data, and there is none"):
        drop_blocks(model_of(BODY, WEIGHTS), [], count=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one target, found none"),
        ({"count": 1, "sparsity": 0.5}, "expected one target, found"),
        ({"count": 0}, "count must be positive"),
        ({"speedup": 1.0}, "speedup must be above 1"),
        ({"sparsity": 1.5}, "sparsity must be above 0 and at most 1"),
        ({"count": 1, "samples": 0}, "samples must be positive"),
        ({"count": 1, "deployed_with": "fuse{"}, "deployed_with: pipeline text"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(PipelineError, match=message):
        DropBlocks(**options)


def test_options_are_read_back():
    text = 'drop-blocks{method=greedy,speedup=1.5,unit=layer,protect=[-1,0],deployed_with="fuse"}'
    (found,) = Pipeline.of(text)
    assert found == DropBlocks(method="greedy", speedup=1.5, unit="layer", protect=(-1, 0))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.5, 10))
def test_bisection_finds_the_first_that_reaches(gains, target):
    speedups = np.cumsum([1.0, *gains]).tolist()
    first = next((count for count, speedup in enumerate(speedups) if speedup >= target), None)
    found = fewest_reaching(target, len(gains), speedups.__getitem__)
    assert found == (first, speedups[-1] if first is None else speedups[first])


def module(name, kind):
    return ResidualModule(name=name, kind=kind, input="", output="", branch="", nodes=(), groups=())


def test_layers_are_told_by_names_and_by_order():
    kinds = ("attention", "attention", "ffn")
    by_name = [
        module(f"decoder.block.{layer}.layer.{i}", kind) for layer in (0, 1) for i, kind in enumerate(kinds)
    ]
    assert layers_of(by_name) == [by_name[:3], by_name[3:]]
    by_order = [module(f"stage.{kind}", kind) for _ in (0, 1) for kind in kinds]
    assert layers_of(by_order) == [by_order[:3], by_order[3:]]
    # The FFN of layer 0 was dropped before.
    assert layers_of([by_name[0], *by_name[3:]]) == [by_name[:1], by_name[3:]]


@pytest.fixture(scope="module")
def torch_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=64,
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    embedding = llama.model.embed_tokens.weight
    with torch.no_grad():
        # Words lie on a plane, which every block bends further: all but the useless ones add entropy.
        embedding[:, 2:] = embedding[:, :2] @ torch.randn(2, 14)
        for parameter in llama.model.layers.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)  # so that blocks matter beside the embedding
        llama.model.layers[1].self_attn.o_proj.weight.zero_()
        llama.model.layers[2].mlp.down_proj.weight.zero_()
    return llama


@pytest.fixture(scope="module")
def llama(torch_llama):
    model = trace(torch_llama)
    run_pipeline(model, Pipeline.of(Canonicalize()), target=TARGET)
    return model


IDS = np.random.default_rng(0).integers(0, 50, (6, 20))


def llama_data(model):
    return CalibrationData.read([{"input_ids": IDS}], model)


@pytest.mark.parametrize("method", ["entropy", "greedy"])
def test_llama_drops_the_useless_blocks_first_and_generates_on(method, torch_llama, llama):
    """One attention and one FFN are useless: the logits are those of torch, with the caches of the rest."""
    model = clone(llama)
    _, dropped, _ = drop_blocks(model, llama_data(llama), method=method, count=2)
    assert set(names(dropped)) == {"model.layers.1.self_attn", "model.layers.2.mlp"}
    caches = [value.name for value in model.graph.inputs if value.name.startswith("past")]
    assert caches == [f"past_key_values.{layer}.{part}" for layer in (0, 2) for part in ("key", "value")]
    with torch.no_grad():
        expected = torch_llama(torch.from_numpy(IDS)).logits.numpy()
    (prefill,) = CalibrationData.read([{"input_ids": IDS[:, :-1]}], model)
    first = run_model(model, prefill)
    step = {
        "input_ids": IDS[:, -1:],
        "attention_mask": np.ones(IDS.shape, np.int64),
        "position_ids": np.full((len(IDS), 1), IDS.shape[1] - 1),
    } | {name: first[name.replace("past_key_values", "present")] for name in caches}
    second = run_model(model, step)
    found = np.concatenate([first["logits"], second["logits"]], axis=1)
    tolerance = 1e-4 * np.abs(expected).max()  # three layers of float32 sums of at most 24 terms
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_llama_layers_go_as_a_whole(llama):
    model = clone(llama)
    result, dropped, _ = drop_blocks(model, llama_data(llama), count=1, unit="layer", protect=(0, 2))
    assert names(dropped) == ["model.layers.1.self_attn to model.layers.1.mlp"]
    assert result.statistics == {"dropped attention": 1, "dropped ffn": 1}
    assert {m.name for m in discover(model).modules} == {
        f"model.layers.{layer}.{part}" for layer in (0, 2) for part in ("self_attn", "mlp")
    }


def test_bert_drops_the_useless_blocks_first():
    """Post-norm: the norm after the addition stays, so a branch of zeros still changes nothing."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24
    )
    bert = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in bert.encoder.parameters():
            parameter.mul_(10 if parameter.ndim == 2 else 1)
        for dense in (bert.encoder.layer[0].attention.output.dense, bert.encoder.layer[1].output.dense):
            dense.weight.zero_()
            dense.bias.zero_()
    example = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.ones(IDS.shape, dtype=torch.int64)}
    model = trace(bert, example)
    run_pipeline(model, Pipeline.of(Canonicalize()), target=TARGET)
    useless = {f"encoder.layer.{path}.dense.weight" for path in ("0.attention.output", "1.output")}
    assert useless <= set(model.graph.initializers)
    feeds = {name: value.numpy() for name, value in example.items()}
    expected = run_model(model, feeds)
    _, dropped, _ = drop_blocks(model, [feeds], method="greedy", count=2)
    assert len(dropped) == 2
    assert useless.isdisjoint(model.graph.initializers)
    found = run_model(model, feeds)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def attention(number, stream, output):
    projected = " ".join(
        f'{part}{number} = MatMul ({stream}, "layers.{number}.{part}.weight")' for part in "qkv"
    )
    past = f'"past_key_values.{number}.key", "past_key_values.{number}.value"'
    return (
        f'{projected} h{number}, "present.{number}.key", "present.{number}.value" = '
        f"Attention <q_num_heads=2, kv_num_heads=2> (q{number}, k{number}, v{number}, , {past})"
        f' o{number} = MatMul (h{number}, "layers.{number}.o.weight") {output} = Add ({stream}, o{number})'
    )


def test_an_attention_whose_cache_is_needed_stays():
    """What is added to the stream is the length of a cache: one attention must keep its cache, the first."""
    caches = [f"{{}}.{number}.{part}" for number in (0, 1) for part in ("key", "value")]
    model = model_of(
        'length = Shape <start=2, end=3> ("past_key_values.0.key") l = Cast <to=1> (length) p = Add (x, l) '
        + " ".join((attention(0, "p", "s"), attention(1, "s", "y"))),
        {
            f"layers.{number}.{part}.weight": random(WIDTH, WIDTH, seed=number + 10 * ord(part))
            for number in (0, 1)
            for part in "qkvo"
        },
        f"float[batch, sequence, {WIDTH}] x, "
        + ", ".join(f'float[batch, 2, past, 4] "{name.format("past_key_values")}"' for name in caches),
        f"float[batch, sequence, {WIDTH}] y, "
        + ", ".join(f'float[batch, 2, total, 4] "{name.format("present")}"' for name in caches),
    )
    pasts = {name.format("past_key_values"): random(4, 2, 3, 4, seed=i) for i, name in enumerate(caches)}
    data = [sample | pasts for sample in SAMPLES]
    with pytest.raises(PassError, match="count=2 cannot be reached: 1 modules may go"):
        drop_blocks(model, data, count=2)
    result, dropped, _ = drop_blocks(model, data, count=1)
    assert names(dropped) == ["layers.1"]
    assert [value.name for value in model.graph.inputs] == [
        "x",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    (skip,) = result.coverage.skipped
    assert skip.name == "layers.0"
    assert "no cache is left" in skip.reason


@pytest.mark.exhaustive
def test_a_model_that_has_lost_caches_is_timed_against_the_original(llama):
    """Its data lacks the caches of layer 0, which the original still reads."""
    model = clone(llama)
    drop_blocks(model, llama_data(llama), count=1, targets=("model.layers.0.self_attn",))
    options = {"speedup": 1.0001, "sequence": 4, "deployed_with": "fuse"}
    _, _, ctx = drop_blocks(model, llama_data(model), original=llama, **options)
    assert ctx.remarks[0].text.startswith("measured speed-up ")
