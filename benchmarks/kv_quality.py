"""What a smaller key-value cache costs: language, and facts recalled from the context.

Language (`wikilm`): of each window 256 tokens are run, the cache is compressed, and 127 more tokens are given
one behind the other (in one chunk, which is the same). Judged are those tokens alone: perplexity, the
divergence KL(full ‖ compressed) of the predictions, and how often the likeliest token is the same.

Recall (`recall_model`): texts of several lengths with 12 facts in filler, the cache compressed before the
question (agnostic) or behind it (aware); judged is whether the answer is right, over the depth at which the
fact lies.

Every policy keeps the same numbers of tokens, the last 16 among them; queries are those of the last 16.

    python benchmarks/kv_quality.py                              # everything; writes results/kv_quality.md
    python benchmarks/kv_quality.py --only snapkv --keeps 0.5    # rows whose name contains a text; prints

Rows are kept in the work folder and read from there the next time, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import planish
import recall_model
import torch
import wikilm
from planish.ir import clone
from planish.runtime.compiled_model import CompiledModel
from rich.console import Console
from scipy.special import log_softmax

Tokens = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating[Any]]

KEEPS = (0.25, 0.5, 0.75)
_SIDES = "recent=16"
_DISTILL = "distill{steps=60}"
_HALF = "half"
"""Stands for half the number of a model's heads of keys and values."""
POLICIES: Mapping[str, str] = {
    "random": "policy=random,sinks=0",
    "recent": "policy=recent,sinks=0",
    "sinks + recent": "policy=recent",
    "knorm": "policy=knorm",
    "keydiff": "policy=keydiff",
    "tova": "policy=tova",
    "h2o": "policy=h2o",
    "snapkv": "policy=snapkv,window=16",
    "snapkv, pyramid": "policy=snapkv,window=16,budget=pyramid",
    "snapkv, graphkv": "policy=snapkv,window=16,rescore=graphkv",
    "snapkv, kvcrush": "policy=snapkv,window=16,rescore=kvcrush",
    "snapkv, drawn": "policy=snapkv,window=16,rescore=drawn",
    "snapkv, merged": "policy=snapkv,window=16,merge=true",
    "snapkv, prefix": "policy=snapkv,window=16,budget=prefix",
    "snapkv, heads": "policy=snapkv,window=16,budget=heads",
    "snapkv, cokv": "policy=snapkv,window=16,budget=cokv",
    "expected attention": "policy=expected-attention",
    "expected attention, pyramid": "policy=expected-attention,budget=pyramid",
    "expected attention, graphkv": "policy=expected-attention,rescore=graphkv",
    "expected attention, kvcrush": "policy=expected-attention,rescore=kvcrush",
    "expected attention, drawn": "policy=expected-attention,rescore=drawn",
    "expected attention, merged": "policy=expected-attention,merge=true",
    "expected attention, prefix": "policy=expected-attention,budget=prefix",
    "expected attention, heads": "policy=expected-attention,budget=heads",
    "expected attention, cokv": "policy=expected-attention,budget=cokv",
}
OTHERS: Mapping[str, tuple[str, float]] = {
    "int8 per tensor": ("fuse,kv-cache{bits=8,granularity=per-tensor}", 0.25),
    "int8 per channel": ("fuse,kv-cache{bits=8}", 0.25),
    "int4 per tensor": ("fuse,kv-cache{bits=4,granularity=per-tensor}", 0.125),
    "int4 per channel": ("fuse,kv-cache{bits=4}", 0.125),
    "int4 per channel, centred": ("center-cache,fuse,kv-cache{bits=4}", 0.125),
    "int4 per channel, rotated": ("rotate{rotations=[R2,R3],when=always},fuse,kv-cache{bits=4}", 0.125),
    "int4 per channel, values rotated": ("rotate{rotations=[R2],when=always},fuse,kv-cache{bits=4}", 0.125),
    "heads of 75 %": ("shrink-heads{keep=0.75},fuse,raise-cache", 0.75),
    "heads of 50 %": ("shrink-heads{keep=0.5},fuse,raise-cache", 0.5),
    "half the heads of keys and values": (f"group-queries{{kv_heads={_HALF}}},fuse,raise-cache", 0.5),
}
"""Caches of all tokens: passes, and bytes as a share of the full one's."""
DISTILLED: Mapping[str, tuple[str, float]] = {
    "heads of 50 %, distilled": (f"shrink-heads{{keep=0.5}},{_DISTILL},fuse,raise-cache", 0.5),
    "half the heads of keys and values, distilled": (
        f"group-queries{{kv_heads={_HALF}}},{_DISTILL},fuse,raise-cache",
        0.5,
    ),
}
"""The same with training, which takes minutes: they come last."""
_BOTH = ("snapkv", "expected attention")
"""Policies that are also run on a cache of 8 bits."""
FULL, _FULL = "full", "fuse,raise-cache"
SEEDS = (0, 1, 2)
_PREFILL = 256
_DEPTHS = 4
_RESULTS = Path(__file__).parent / "results" / "kv_quality.md"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: of policy or grid.
        passes: behind ``canonicalize``.
        keep: share of the tokens.
        bytes: of the cache, as a share of the full one.
        seeds: seeds of the compiler; several where it draws random numbers.
    """

    name: str
    passes: str
    keep: float
    bytes: float
    seeds: tuple[int, ...] = (0,)


def methods(keeps: Sequence[float]) -> Iterator[Method]:
    """All rows."""
    yield Method(FULL, _FULL, 1.0, 1.0)
    for name, (passes, share) in OTHERS.items():
        yield Method(name, passes, 1.0, share)
    for name, options in POLICIES.items():
        seeds = SEEDS if name == "random" or "drawn" in name else (0,)
        for keep in keeps:
            evict = f"evict{{{options},keep={keep:g},{_SIDES}}}"
            yield Method(name, f"fuse,{evict}", keep, keep, seeds)
            if name in _BOTH:
                yield Method(f"{name}, int8", f"fuse,kv-cache{{bits=8}},{evict}", keep, keep / 4)
    for name, (passes, share) in DISTILLED.items():
        yield Method(name, passes, 1.0, share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """On the language model.

    Attributes:
        perplexity: of the judged tokens.
        divergence: KL(full ‖ compressed) in nats, mean.
        agreement: share of positions with the same likeliest token.
    """

    perplexity: float
    divergence: float
    agreement: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
    """Shares of right answers in texts of one length.

    Attributes:
        aware, agnostic: over all texts, one number for each seed.
        depths: agnostic, by the quarter of the text in which the fact lies.
    """

    aware: tuple[float, ...]
    agnostic: tuple[float, ...]
    depths: tuple[float, ...]


def language(
    compiled: CompiledModel, windows: Tokens, full: Sequence[Floats] | None
) -> tuple[Language, list[Floats]]:
    """Judge one model; with ``full``, the log probabilities of the full cache, window by window."""
    losses, divergences, agreements, found = [], [], [], []
    decoder = compiled.decoder(capacity=windows.shape[1])
    for index, window in enumerate(windows):
        decoder.truncate(0)
        decoder.forward(window[None, :_PREFILL])
        rest = window[_PREFILL:]
        if decoder.evicts:
            decoder.evict(room=len(rest))
        logits = decoder.forward(rest[None, :-1])[0].astype(np.float64)
        predicted = log_softmax(logits, axis=-1)
        losses.append(-predicted[np.arange(len(rest) - 1), rest[1:]].mean())
        reference = predicted if full is None else full[index]
        divergences.append((np.exp(reference) * (reference - predicted)).sum(-1).mean())
        agreements.append((reference.argmax(-1) == predicted.argmax(-1)).mean())
        if full is None:
            found.append(predicted)
    judged = Language(
        perplexity=float(np.exp(np.mean(losses))),
        divergence=float(np.mean(divergences)),
        agreement=float(np.mean(agreements)),
    )
    return judged, found


def recall(compiled: CompiledModel, length: int, count: int) -> Recall:
    """Judge one model on texts of one length; every seed has texts of its own."""
    aware, agnostic = [], []
    by_depth: list[list[bool]] = [[] for _ in range(_DEPTHS)]
    decoder = compiled.decoder(capacity=length + 8)
    for seed in SEEDS:
        rng = np.random.default_rng(1000 + seed)
        given = recall_model.texts(rng, count, length)
        known, asked_before = [], []
        for text in range(count):
            answers = _answers(decoder, given, text)
            known += answers
            for fact, right in enumerate(answers):
                by_depth[int(given.positions[text, fact]) * _DEPTHS // length].append(right)
            for fact in rng.permutation(given.keys.shape[1])[:3]:
                asked_before.append(_answer_behind_question(decoder, given, text, int(fact)))
        agnostic.append(float(np.mean(known)))
        aware.append(float(np.mean(asked_before)))
    return Recall(
        aware=tuple(aware),
        agnostic=tuple(agnostic),
        depths=tuple(float(np.mean(answers)) for answers in by_depth),
    )


def _answers(decoder: Any, given: recall_model.Texts, text: int) -> list[bool]:
    """Of each fact, whether it is known after the text was compressed."""
    decoder.truncate(0)
    decoder.forward(given.ids[None, text])
    if decoder.evicts:
        decoder.evict(room=8)
    length, right = decoder.length, []
    for key, value in zip(given.keys[text], given.values[text], strict=True):
        logits = decoder.forward(np.array([[recall_model.ASK, key, recall_model.ANSWER]]))
        right.append(bool(logits[0, -1].argmax() == value))
        decoder.truncate(length)
    return right


def _answer_behind_question(decoder: Any, given: recall_model.Texts, text: int, fact: int) -> bool:
    """Whether a fact is known after the text and the question were compressed together."""
    decoder.truncate(0)
    question = [recall_model.ASK, given.keys[text, fact]]
    decoder.forward(np.concatenate([given.ids[text], question])[None])
    if decoder.evicts:
        decoder.evict(room=8)
    logits = decoder.forward(np.array([[recall_model.ANSWER]]))
    return bool(logits[0, -1].argmax() == given.values[text, fact])


class Subject:
    """A model that is compiled again and again.

    Args:
        module: a causal language model of transformers.
        calibration: ids [texts, length].
        training: ids [texts, length], for methods that distil.
    """

    def __init__(self, module: torch.nn.Module, calibration: Tokens, training: Tokens) -> None:
        self._half = str(module.config.num_key_value_heads // 2)
        self._graph: ir.Model = planish.compile(module, "canonicalize", target="portable").model
        self._calibration = [{"input_ids": calibration}]
        self._training = [{"input_ids": training[start : start + 8]} for start in range(0, len(training), 8)]

    def compiled(self, method: Method, seed: int) -> CompiledModel:
        """With the cache of a method; the full one is raised, so that the same kernel runs."""
        return planish.compile(
            clone(self._graph),
            method.passes.replace(_HALF, self._half),
            calibration=self._calibration,
            training=self._training,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method.

    Attributes:
        method: what it is.
        language: mean over its seeds.
        recall: by length of the texts.
    """

    method: Method
    language: Language
    recall: Mapping[int, Recall]

    def write(self, path: Path) -> None:
        """Keep it."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self)))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path, method: Method) -> Row:
        """One that was kept."""
        kept = json.loads(path.read_text())
        return cls(
            method=method,
            language=Language(**kept["language"]),
            recall={
                int(length): Recall(**{name: tuple(shares) for name, shares in one.items()})
                for length, one in kept["recall"].items()
            },
        )

    @property
    def longest(self) -> Recall:
        """Recall in the longest texts."""
        return self.recall[max(self.recall)]


class Bench:
    """What all rows are measured on.

    Args:
        speaker: the language model.
        knower: the model that recalls.
        windows: of text [windows, length].
        lengths: of texts with facts.
        texts: of each length, for each seed.
    """

    def __init__(
        self, speaker: Subject, knower: Subject, windows: Tokens, lengths: tuple[int, ...], texts: int
    ) -> None:
        self._speaker, self._knower, self._windows = speaker, knower, windows
        self._lengths, self._texts = lengths, texts

    @functools.cached_property
    def _full(self) -> list[Floats]:
        """Log probabilities of the full cache, window by window."""
        return language(self._speaker.compiled(Method(FULL, _FULL, 1.0, 1.0), 0), self._windows, None)[1]

    def row(self, method: Method) -> Row:
        """Measure one method."""
        spoken = [
            language(self._speaker.compiled(method, seed), self._windows, self._full)[0]
            for seed in method.seeds
        ]
        compiled = self._knower.compiled(method, 0)
        known = {length: recall(compiled, length, self._texts) for length in self._lengths}
        return Row(method=method, language=mean_of(spoken), recall=known)


def lines(rows: Sequence[Row], windows: int, texts: int) -> list[str]:
    """Markdown: the table, recall over depth and length, and a ranking."""
    lengths = sorted(rows[0].recall)
    result = [
        "# Quality of compressed caches",
        "",
        f"Language: {windows} windows, {_PREFILL} tokens compressed, the 127 behind them judged. Recall: "
        f"texts of {lengths[-1]} tokens with 12 facts, {texts} for each of {len(SEEDS)} seeds; mean and half "
        "the range over seeds. Written by `benchmarks/kv_quality.py`.",
        "",
        "| cache | tokens kept | bytes | perplexity | KL to the full cache | same likeliest token "
        "| recall, aware | recall, agnostic |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spoken, known = row.language, row.longest
        cells = [row.method.name, f"{row.method.keep:.0%}", f"{row.method.bytes:.1%}"]
        cells += [f"{spoken.perplexity:.2f}", f"{spoken.divergence:.4f}", f"{spoken.agreement:.1%}"]
        cells += [_spread(known.aware), _spread(known.agnostic)]
        result.append(f"| {' | '.join(cells)} |")
    return [*result, "", *ranking(rows), *depths(rows, lengths)]


def depths(rows: Sequence[Row], lengths: Sequence[int]) -> list[str]:
    """Agnostic recall by length of the text and depth of the fact."""
    names = " | ".join(f"{length} tokens" for length in lengths)
    return [
        "## Recall by length and depth",
        "",
        "Query-agnostic; facts in the first to the last quarter of the text.",
        "",
        f"| cache | tokens kept | {names} |",
        "|---|---|" + "---|" * len(lengths),
        *(
            f"| {row.method.name} | {row.method.keep:.0%} | "
            + " | ".join(_shares(row.recall[length].depths) for length in lengths)
            + " |"
            for row in rows
        ),
        "",
    ]


def _shares(depths: Sequence[float]) -> str:
    return " ".join(f"{depth:.0%}" for depth in depths)


def _spread(shares: Sequence[float]) -> str:
    return f"{np.mean(shares):.1%} ± {(max(shares) - min(shares)) / 2:.1%}"


def ranking(rows: Sequence[Row]) -> list[str]:
    """Policies by the mean of their ranks in perplexity and both recalls, over all shares of tokens."""
    policies = [row for row in rows if row.method.name in POLICIES]
    if not policies:
        return []
    ranks: dict[str, list[int]] = {}
    scores: Sequence[Callable[[Row], float]] = (
        lambda row: row.language.perplexity,
        lambda row: -float(np.mean(row.longest.aware)),
        lambda row: -float(np.mean(row.longest.agnostic)),
    )
    for keep in {row.method.keep for row in policies}:
        level = [row for row in policies if row.method.keep == keep]
        for score in scores:
            for rank, row in enumerate(sorted(level, key=score), start=1):
                ranks.setdefault(row.method.name, []).append(rank)
    means = sorted((float(np.mean(places)), name) for name, places in ranks.items())
    return [
        "## Ranking",
        "",
        "Mean rank in perplexity, aware and agnostic recall over all shares of tokens (1 is best).",
        "",
        "| policy | mean rank |",
        "|---|---|",
        *(f"| {name} | {mean:.1f} |" for mean, name in means),
        "",
    ]


def mean_of(found: Sequence[Language]) -> Language:
    """Over seeds."""
    return Language(
        **{
            field.name: float(np.mean([getattr(one, field.name) for one in found]))
            for field in dataclasses.fields(Language)
        }
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    wikilm.add_arguments(parser)
    parser.add_argument("--only", default="", help="rows whose name contains this; the full cache besides")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS, help="shares of tokens")
    parser.add_argument("--lengths", type=int, nargs="+", default=(128, 384), help="of texts with facts")
    parser.add_argument("--texts", type=int, default=24, help="with facts, for each seed")
    parser.add_argument("--output", type=Path, default=Path("demo-output/kv-quality"), help="work folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=160, highlight=False)
    say = lambda line: console.print(f"[dim]{line}[/dim]")  # noqa: E731
    small = wikilm.WikiLM.find(arguments.shared)
    windows = small.evaluation_windows(arguments.windows)[:, : _PREFILL + 128]
    speaker = Subject(small.load(), small.calibration_windows(32), small.calibration_windows(512))
    knower = recalling_subject(arguments.output, max(arguments.lengths), say)
    bench = Bench(speaker, knower, windows, tuple(arguments.lengths), arguments.texts)
    rows: list[Row] = []
    for method in methods(arguments.keeps):
        if method.name != FULL and arguments.only not in method.name:
            continue
        # A name for everything that the figures depend on.
        settings = f"{method} {len(windows)} {arguments.lengths} {arguments.texts}"
        path = arguments.output / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            bench.row(method).write(path)
        rows.append(Row.read(path, method))
        say(str(rows[-1]))
    text = "\n".join(lines(rows, len(windows), arguments.texts))
    if arguments.only or tuple(arguments.keeps) != KEEPS:
        print(text)
    else:
        _RESULTS.write_text(text)


def recalling_subject(folder: Path, length: int, say: Callable[[str], None]) -> Subject:
    """The trained recall model, with texts to calibrate it on and texts with questions to train it on."""
    rng = np.random.default_rng(99)
    module = recall_model.trained(folder, say)
    calibration = recall_model.texts(rng, 32, length).ids
    training, _ = recall_model.with_questions(rng, recall_model.texts(rng, 512, length), 8)
    return Subject(module, calibration, training)


if __name__ == "__main__":
    main()
