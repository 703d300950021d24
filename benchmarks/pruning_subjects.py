"""The models that are pruned: their graphs, calibration data, deployments, and how pruned files are judged.

Two models: the demo's sentence-embedding model, and the language model of `wikilm`. Calibration never sees
what is judged. Both are calibrated on `calibration.txt` of `wikilm`'s data, the sentence model on sentences
of it that have all their words, written as people write them: the text as it is has gaps for rare words and
spaces around every sign, which the sentence model never meets. The language model is judged on
`evaluation.txt`, the sentence model on the benchmark's 240 sentences, which are in neither file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import planish
import sentence_model
import torch
import wikilm
from planish.codegen.target import Target
from quality import calibration_sentences, tokenised

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Run = Callable[[Feeds], Mapping[str, Array]]

DENSE = "canonicalize,fuse"
_SENTENCES = 16
"""In a batch of the sentence model's calibration data."""
_GAP = "<unk>"
_SIGNS = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?%)\]])", r"\1"),
    (r"([(\[]) ", r"\1"),
    (r" ('s|n't)\b", r"\1"),
    (r'" ([^"]*) "', r'"\1"'),
)
"""How the text is spaced, and how it was written."""
_OPTIONS = "planish.session_options"


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of quality.

    Attributes:
        name: as tables show it.
        higher_is_better: as of a cosine, and not of a perplexity.
        digits: behind the point.
    """

    name: str
    higher_is_better: bool
    digits: int

    def better(self, value: float, other: float) -> bool:
        """Whether ``value`` is strictly better than ``other``."""
        return value > other if self.higher_is_better else value < other

    def text(self, value: float) -> str:
        """As tables show it."""
        return f"{value:.{self.digits}f}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with the deployment that it is pruned for.

    Attributes:
        name: for the command line and for folders.
        title: for headings.
        batch: samples of a call.
        sequence: tokens of a sample.
        metrics: what `judge` gives; the first is the one that methods are compared by.
        load_module: gives the torch module, fresh and unpruned.
        example: what to trace the module with; None for a transformers causal language model.
        calibration: real inputs by graph-input name.
        losses: how many samples of them losses are measured on.
        judge: figures of how good a model is, by the metric's name.
    """

    name: str
    title: str
    batch: int
    sequence: int
    metrics: tuple[Metric, ...]
    load_module: Callable[[], torch.nn.Module]
    example: Callable[[], dict[str, torch.Tensor] | None]
    calibration: Sequence[Feeds]
    losses: int
    judge: Callable[[Run], dict[str, float]]

    @functools.cached_property
    def graph(self) -> ir.Model:
        """The dense model, canonical. `planish.compile` leaves it as it is."""
        return planish.compile(
            self.load_module(), "canonicalize", example_inputs=self.example(), target="portable"
        ).model

    @property
    def target(self) -> Target:
        """Kernels are chosen for the tokens of one call."""
        return planish.get_target("onnxruntime-cpu", rows=(self.batch * self.sequence,))

    @property
    def metric(self) -> Metric:
        """What methods are compared by."""
        return self.metrics[0]

    def deployment_feeds(self) -> dict[str, Array]:
        """One call of the deployment: real token ids, nothing padded; a decoder's cache is left out."""
        ids = np.concatenate([feeds["input_ids"].reshape(-1) for feeds in self.calibration])
        ids = np.resize(ids, (self.batch, self.sequence))
        return {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.broadcast_to(np.arange(self.sequence), ids.shape).copy(),
        }


class OnnxFile:
    """A compiled file in plain onnxruntime, with the session options that the file asks for."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        for key, value in json.loads(properties.get(_OPTIONS, "{}")).items():
            options.add_session_config_entry(key, value)
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def complete(self, feeds: Feeds) -> dict[str, Array]:
        """The file's own inputs: what it lost in pruning is left out, caches are empty and as wide as its."""
        batch = len(feeds["input_ids"])
        arrays = {}
        for value in self._session.get_inputs():
            if value.name.startswith("past_key_values"):
                arrays[value.name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
            else:
                arrays[value.name] = feeds[value.name]
        return arrays

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        """Run on inputs that `complete` made complete, or on a batch that needs it."""
        outputs = self._session.run(self._outputs, self.complete(feeds))
        return dict(zip(self._outputs, outputs, strict=True))

    def timed(self, feeds: Feeds) -> Callable[[], object]:
        """One call on these inputs and nothing else."""
        return functools.partial(self._session.run, None, self.complete(feeds))


def plain_sentences(found: wikilm.WikiLM) -> list[str]:
    """Sentences of the calibration text without gaps and headings, signs joined to their words again."""
    whole = [text for text in calibration_sentences(found) if _GAP not in text and not text.startswith("=")]
    plain = []
    for text in whole:
        for written, meant in _SIGNS:
            text = re.sub(written, meant, text)
        plain.append(text if text.endswith(".") else f"{text}.")
    return plain


def sentences(found: wikilm.WikiLM, batch: int, samples: int = 1024) -> Subject:
    """The sentence-embedding model at a batch size, sequence 128, calibrated on so many sentences."""
    reference = functools.cache(lambda: sentence_model.reference_embeddings(sentence_model.load_module()))

    def judge(run: Run) -> dict[str, float]:
        quality = sentence_model.judge(lambda feeds: next(iter(run(feeds).values())), reference())
        return {
            "cosine mean": quality.cosine_mean,
            "cosine min": quality.cosine_min,
            "nearest": quality.nearest_agreement,
        }

    return Subject(
        name=f"sentences-b{batch}",
        title=f"all-MiniLM-L6-v2, batch {batch}, sequence 128",
        batch=batch,
        sequence=128,
        metrics=(Metric("cosine mean", True, 4), Metric("cosine min", True, 4), Metric("nearest", True, 3)),
        load_module=sentence_model.load_module,
        example=sentence_model.example,
        calibration=tokenised(plain_sentences(found), max(1, samples // _SENTENCES), _SENTENCES),
        losses=32,
        judge=judge,
    )


def language_model(found: wikilm.WikiLM, windows: int, samples: int = 128) -> Subject:
    """The small trained Llama at batch 1 and its whole context, calibrated on so many windows."""
    evaluation = functools.cache(lambda: found.evaluation_windows(windows))

    def logits(run: Run, ids: Array) -> Array:
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions}
        return run(feeds)["logits"]

    def judge(run: Run) -> dict[str, float]:
        return {"perplexity": wikilm.perplexity(functools.partial(logits, run), evaluation())}

    return Subject(
        name="wikilm",
        title=f"wikilm, batch 1, sequence {wikilm.CONTEXT}",
        batch=1,
        sequence=wikilm.CONTEXT,
        metrics=(Metric("perplexity", False, 2),),
        load_module=found.load,
        example=lambda: None,
        calibration=[{"input_ids": ids[None]} for ids in found.calibration_windows(samples)],
        losses=4,
        judge=judge,
    )


NAMES = ("sentences-b1", "sentences-b8", "wikilm")


def subject(name: str, found: wikilm.WikiLM, *, samples: int | None, windows: int) -> Subject:
    """A subject by its name.

    Args:
        name: one of `NAMES`.
        found: where the language model and the text are.
        samples: calibration sentences, or windows of the language model; None for as many as suit the model.
        windows: of the language model's evaluation.
    """
    chosen = {} if samples is None else {"samples": samples}
    if name == "wikilm":
        return language_model(found, windows, **chosen)
    return sentences(found, int(name.removeprefix("sentences-b")), **chosen)
