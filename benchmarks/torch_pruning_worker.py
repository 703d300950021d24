"""Torch-Pruning on one model, in a process of its own: files that are as fast as asked for.

    python -m pip install --no-deps --target FOLDER torch-pruning
    python torch_pruning_worker.py JOB --site FOLDER

``pruning_quality.py --torch-pruning FOLDER`` starts this file. Torch-Pruning needs torch and numpy, which
are there; seen to run is 1.6.1. JOB is a folder with ``dense.onnx`` and ``job.json`` (subject, variant,
targets, samples, shared). For each target ``<target>.json`` comes to lie beside them, with the pruning ratio,
the measured speed-up and the pruned model's file, or with why there is none.

Torch-Pruning has ratios and no speeds. So for each target its ratio is searched for until the pruned module,
traced and compiled by planish with the pipeline that the dense model got, is as fast as the target: the same
graph optimisations and kernels for both. What is searched is the ratio of heads and FFN channels together, as
in its examples for transformers; channels in multiples of 8.

Importances are its two usual ones: the group's magnitude, and the group's first-order Taylor expansion, with
gradients of the next token's cross entropy; for sentences, of the contrastive loss between two dropout masks
(SimCSE). The ratio is the same in all layers, or the ranking is global. Two things in which the language
model, a Llama with grouped queries, goes beyond what 1.6.1 can do:

- Its dependency graph does not end on rotary embeddings together with grouped queries, so it is built without
  the rotation, which moves no channel between heads.
- It prunes no head where two query heads share a KV head. Key and value heads are therefore repeated for
  each query head first ("ungrouped"), with the same function and at the cost of some speed; or heads stay.

Pruning the hidden size, as its language-model example does, is a variant of the language model alone: the
hidden size of the sentence model is that of the embeddings that it gives.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planish
import pruning_subjects
import torch
import wikilm
from planish.ir.errors import PlanishError
from planish.runtime.measure import interleaved_latency
from pruning_subjects import DENSE, OnnxFile, Subject
from transformers.models.bert.modeling_bert import BertOutput, BertSelfAttention, BertSelfOutput
from transformers.models.llama import modeling_llama

_TOLERANCE = 0.03
_ATTEMPTS = 8
"""Files that are built for one target at most; those of other targets help."""
_MOST = 0.98
"""Largest ratio that leaves 8 of the channels in all models here."""
_MOST_HIDDEN = 0.95
_FINEST = 0.01
"""Ratios that are nearer to each other are not told apart: their times differ by less than two runs'."""
_TEMPERATURE = 0.05
_ROUNDS = 30
"""In which a file is timed beside the dense model's."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """How Torch-Pruning is used.

    Attributes:
        importance: ``magnitude`` or ``taylor``.
        ranks_globally: over all layers; else each layer loses the same share.
        heads: prunes attention heads beside FFN channels.
        hidden: prunes the hidden size too.
    """

    importance: str
    ranks_globally: bool = False
    heads: bool = True
    hidden: bool = False


_SENTENCES = {
    "magnitude": Variant("magnitude"),
    "Taylor, global": Variant("taylor", ranks_globally=True),
}
_LANGUAGE_MODEL = {
    "Taylor, ungrouped": Variant("taylor"),
    "Taylor, FFN, global": Variant("taylor", ranks_globally=True, heads=False),
    "Taylor, hidden size": Variant("taylor", heads=False, hidden=True),
}


def variants(subject: str) -> dict[str, Variant]:
    """The variants that a subject can have, by name."""
    return _LANGUAGE_MODEL if subject == "wikilm" else _SENTENCES


class Pruner:
    """Prunes the torch module of a subject to a ratio."""

    def __init__(self, subject: Subject, variant: Variant) -> None:
        import torch_pruning

        self._library, self._subject, self._variant = torch_pruning, subject, variant
        self._gradients: dict[str, torch.Tensor] = {}
        self.most = _MOST_HIDDEN if variant.hidden else _MOST

    @property
    def is_decoder(self) -> bool:
        """The language model, not the sentence model."""
        return self._subject.example() is None

    def __call__(self, ratio: float) -> torch.nn.Module:
        """The pruned module."""
        module = self._subject.load_module()
        if self.is_decoder and self._variant.heads:
            ungroup_queries(module)
        importance = self._importance(module)
        heads = self._heads(module)
        count = max(heads.values(), default=1)
        with without_rotation():
            pruner = self._library.pruner.BasePruner(
                module,
                self._example(),
                importance=importance,
                global_pruning=self._variant.ranks_globally,
                pruning_ratio=ratio,
                # One head stays: without any, Torch-Pruning leaves the whole layer alone.
                head_pruning_ratio=min(ratio, (count - 1) / count) if self._variant.heads else 0.0,
                num_heads=heads,
                # Its defaults are dictionaries that one call would leave to the next.
                in_channel_groups={},
                out_channel_groups={},
                prune_num_heads=self._variant.heads,
                prune_head_dims=False,
                ignored_layers=self._ignored(module),
                output_transform=lambda output: output.logits if self.is_decoder else output,
                round_to=8,
            )
        pruner.step()
        module.zero_grad(set_to_none=True)
        self._set_sizes(module)
        return module

    def _example(self) -> dict[str, Any]:
        example = self._subject.example()
        return example or {"input_ids": torch.arange(16)[None], "use_cache": False}

    def _heads(self, module: torch.nn.Module) -> dict[torch.nn.Module, int]:
        """How many heads each projection has."""
        heads = {}
        for part in module.modules():
            if isinstance(part, BertSelfAttention):
                heads |= dict.fromkeys((part.query, part.key, part.value), part.num_attention_heads)
            elif isinstance(part, modeling_llama.LlamaAttention) and self._variant.heads:
                count = part.config.num_attention_heads
                heads |= dict.fromkeys((part.q_proj, part.k_proj, part.v_proj), count)
        return heads

    def _ignored(self, module: torch.nn.Module) -> list[torch.nn.Module]:
        """Layers whose outputs must keep their width: those on the residual stream, and the head."""
        ignored: list[torch.nn.Module] = []
        for part in module.modules():
            match part:
                case modeling_llama.LlamaForCausalLM():
                    ignored.append(part.lm_head)
                    ignored += [] if self._variant.hidden else [part.model.embed_tokens]
                case BertSelfOutput() | BertOutput():
                    ignored.append(part.dense)
                case modeling_llama.LlamaAttention() if not self._variant.hidden:
                    ignored.append(part.o_proj)
                case modeling_llama.LlamaAttention():
                    # Attention takes part through the hidden size alone.
                    ignored += [part.q_proj, part.k_proj, part.v_proj]
                case modeling_llama.LlamaMLP() if not self._variant.hidden:
                    ignored.append(part.down_proj)
        if self.is_decoder and not self._variant.heads and not self._variant.hidden:
            ignored += [
                projection
                for part in module.modules()
                if isinstance(part, modeling_llama.LlamaAttention)
                for projection in (part.q_proj, part.k_proj, part.v_proj)
            ]
        return ignored

    def _importance(self, module: torch.nn.Module) -> Any:
        if self._variant.importance == "magnitude":
            return self._library.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
        if not self._gradients:
            # The dense module's, which all ratios start from.
            torch.manual_seed(0)
            loss = next_token_loss if self.is_decoder else contrastive_loss
            for feeds in self._subject.calibration:
                tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
                (loss(module, tensors) / len(self._subject.calibration)).backward()
            self._gradients = {
                name: parameter.grad.clone()
                for name, parameter in module.named_parameters()
                if parameter.grad is not None
            }
        for name, parameter in module.named_parameters():
            parameter.grad = self._gradients[name].clone() if name in self._gradients else None
        return self._library.importance.GroupTaylorImportance(group_reduction="mean")

    def _set_sizes(self, module: torch.nn.Module) -> None:
        """What the module's own code and its tracing read instead of the weights' shapes."""
        for part in module.modules():
            if isinstance(part, BertSelfAttention):
                part.all_head_size = part.query.out_features
                part.num_attention_heads = part.all_head_size // part.attention_head_size
            elif isinstance(part, modeling_llama.LlamaForCausalLM):
                attention = part.model.layers[0].self_attn
                part.config.hidden_size = part.lm_head.in_features
                part.config.num_attention_heads = attention.q_proj.out_features // attention.head_dim
                part.config.num_key_value_heads = attention.k_proj.out_features // attention.head_dim


def ungroup_queries(module: Any) -> None:
    """Repeat key and value heads for each query head, in place; the function stays."""
    config = module.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in module.model.layers:
        attention = layer.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            heads = projection.weight.data.unflatten(0, (config.num_key_value_heads, attention.head_dim))
            projection.weight = torch.nn.Parameter(heads.repeat_interleave(repeats, 0).flatten(0, 1))
            projection.out_features = len(projection.weight)
        attention.num_key_value_groups = 1
    config.num_key_value_heads = config.num_attention_heads


@contextlib.contextmanager
def without_rotation() -> Iterator[None]:
    """Llama's attention without rotary embeddings, for the time that dependencies are traced."""
    rotate = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda query, key, *_, **__: (query, key)
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate


def next_token_loss(module: torch.nn.Module, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy."""
    loss: torch.Tensor = module(**feeds, labels=feeds["input_ids"], use_cache=False).loss
    return loss


def contrastive_loss(module: torch.nn.Module, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each sentence is to be nearest to itself under another dropout mask."""
    module.train()
    first, second = module(**feeds), module(**feeds)
    module.eval()
    return torch.nn.functional.cross_entropy(first @ second.T / _TEMPERATURE, torch.arange(len(first)))


@dataclasses.dataclass(frozen=True, order=True)
class Point:
    """A ratio and what was measured at it."""

    ratio: float
    speedup: float
    file: Path = dataclasses.field(compare=False)


class Search:
    """Finds the ratio for a speed-up; what was measured for one target is known for the next."""

    def __init__(self, subject: Subject, pruner: Pruner, folder: Path) -> None:
        self._subject, self._pruner, self._folder = subject, pruner, folder
        self._dense = OnnxFile(folder / "dense.onnx")
        self._points = [Point(0.0, 1.0, folder / "dense.onnx")]

    def find(self, target: float) -> Point:
        """The point nearest to the target; within the tolerance unless the steps are too coarse.

        Raises:
            ValueError: the target is faster than the largest ratio.
        """
        if len(self._points) == 1:
            self._measure(self._pruner.most)
        fastest = max(self._points, key=lambda point: point.speedup)
        if fastest.speedup < target * (1 - _TOLERANCE):
            raise ValueError(f"out of reach: at most {fastest.speedup:.2f} times as fast")
        for _ in range(_ATTEMPTS):
            nearest = min(self._points, key=lambda point: abs(point.speedup / target - 1))
            slow, fast = self._bracket(target)
            if abs(nearest.speedup / target - 1) <= _TOLERANCE or fast.ratio - slow.ratio < _FINEST:
                break
            # Time falls about linearly with the ratio; not too near an end, so that the bracket shrinks.
            share = (1 / slow.speedup - 1 / target) / (1 / slow.speedup - 1 / fast.speedup)
            self._measure(slow.ratio + (fast.ratio - slow.ratio) * min(max(share, 0.1), 0.9))
        return min(self._points, key=lambda point: abs(point.speedup / target - 1))

    def _bracket(self, target: float) -> tuple[Point, Point]:
        """Neighbouring ratios of which the first is too slow and the second fast enough, or the fastest."""
        points = sorted(self._points)
        fastest = max(points, key=lambda point: point.speedup)
        fast = next((point for point in points if point.speedup > target), fastest)
        return max(point for point in points if point.ratio < fast.ratio), fast

    def _measure(self, ratio: float) -> None:
        file = self._folder / f"ratio-{ratio:.4f}.onnx"
        compiled = planish.compile(
            self._pruner(ratio), DENSE, example_inputs=self._subject.example(), target=self._subject.target
        )
        compiled.save(file)
        self._points.append(Point(ratio, self._speedup(OnnxFile(file)), file))
        print(f"ratio {ratio:.4f}: {self._points[-1].speedup:.3f} times as fast", flush=True)

    def _speedup(self, pruned: OnnxFile) -> float:
        feeds = self._subject.deployment_feeds()
        runs = {"dense": self._dense.timed(feeds), "pruned": pruned.timed(feeds)}
        latency = interleaved_latency(runs, repeats=_ROUNDS, burst=1)
        return latency["pruned"].speedup_over(latency["dense"])


def write_results(search: Search, targets: list[float], folder: Path) -> None:
    """A file and its figures for each target."""
    for target in targets:
        result: dict[str, Any] = {"target": target}
        try:
            point = search.find(target)
            result |= {"ratio": point.ratio, "speedup": point.speedup, "file": point.file.name}
        except (ValueError, PlanishError, RuntimeError) as error:
            result["failure"] = str(error).splitlines()[0]
        (folder / f"{target:g}.json").write_text(json.dumps(result))
        print(json.dumps(result), flush=True)


def main() -> None:
    """Do the job of a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("job", type=Path, help="folder with job.json and dense.onnx")
    parser.add_argument("--site", type=Path, help="folder that Torch-Pruning was installed to")
    arguments = parser.parse_args()
    if arguments.site is not None:
        # Behind what is installed, which the folder must not replace.
        sys.path.append(str(arguments.site))
    warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
    job = json.loads((arguments.job / "job.json").read_text())
    shared = None if job["shared"] is None else Path(job["shared"])
    found = wikilm.WikiLM.find(shared)
    subject = pruning_subjects.subject(job["subject"], found, samples=job["samples"], windows=1)
    pruner = Pruner(subject, variants(job["subject"])[job["variant"]])
    write_results(Search(subject, pruner, arguments.job), job["targets"], arguments.job)


if __name__ == "__main__":
    main()
