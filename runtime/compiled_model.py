"""What `planish.compile` returns: a model that runs, and that knows how it came to be."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from ..codegen import get_target
from ..codegen.target import BoundModel, Target
from ..codegen.web import Provider, WebSupport, web_support
from ..ir import save
from ..ir.companions import EVICTION, companions_of
from ..ir.errors import InputError
from ..ir.signature import Signature, flatten_inputs, unflatten_outputs
from .calibration.data import completed
from .executor import Executor, open_executor
from .folder import MODEL_FILE, save_folder
from .generate import Decoder, Eviction, Generation, generate
from .generate.cache import cache_slots
from .generate.memory import Memory, memory
from .generate.prompts import prompts
from .hub import hub_file_names, save_hub
from .measure import Difference, Latency, compare_outputs, interleaved_latency
from .provenance import ParetoPoint, note_binding
from .saved import prefill_file, read_prefill, read_saved
from .torch_session import TorchSession

Array = np.ndarray[Any, Any]

_PROMPT_ROWS = 256
"""Tokens of a run that kernels for prompts are chosen for."""


class Report(Protocol):
    """What the compiler says about what it did; `rich` prints it, `as_dict` is for programs."""

    def __rich__(self) -> Any:
        """A rich renderable: one row per pass."""

    def as_dict(self, *, costs: bool = True) -> dict[str, Any]:
        """JSON-serialisable form; ``costs=False`` leaves time and memory out."""


class CompiledModel:
    """A compiled model. Call it like the module that it came from, or with arrays through `run`.

    Attributes:
        model: the graph after the passes, in the IR (compressed ops are ``planish`` functions).
        bound: the same graph bound to the target's kernels; what `run` executes and `save` writes.
        target: where it runs.
        report: what each pass covered, skipped, changed and cost.
        signature: how to call it like the traced module; None for models that came from ONNX.
        alternatives: further results of the same compilation by their labels, such as ``1.5x``.
        front: what a search under a budget had to choose from, by size; mostly empty.
        eviction: for decoders that forget tokens of their cache, the graph that does so.
    """

    def __init__(
        self,
        *,
        model: ir.Model,
        bound: BoundModel,
        target: Target,
        report: Report,
        signature: Signature | None = None,
    ) -> None:
        self.model = model
        self.bound = bound
        self.target = target
        self.report = report
        self.signature = signature
        self.alternatives: Mapping[str, CompiledModel] = {}
        self.front: tuple[ParetoPoint, ...] = ()
        self.eviction = companions_of(model).get(EVICTION)
        self._path: Path | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, target: str | Target = "onnxruntime-cpu") -> CompiledModel:
        """Open what `save` wrote, with the kernels that it was bound to.

        Args:
            path: an ONNX file, or a folder with ``model.onnx``.
            target: where it runs.

        Raises:
            ModelError: there is no such file, or it is damaged.
        """
        bound, report = read_saved(Path(path))
        target = get_target(target) if isinstance(target, str) else target
        opened = cls(model=bound.model, bound=bound, target=target, report=report)
        opened._path = Path(path)
        return opened

    @functools.cached_property
    def session(self) -> Executor:
        """What runs the model, a session of onnxruntime or a module of torch; created at the first use."""
        return open_executor(self.bound, self.target)

    @property
    def module(self) -> fx.GraphModule:
        """The model as a module of torch, which takes and gives tensors by keyword and by name.

        Raises:
            InputError: the target is not torch.
        """
        if not isinstance(self.session, TorchSession):
            raise InputError(
                f"a model for the target {self.target.name} is no module of torch",
                hint='compile it with target="torch"',
            )
        return self.session.module

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph inputs, in order."""
        return tuple(value.name or "" for value in self.bound.model.graph.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the graph outputs, in order."""
        return tuple(value.name or "" for value in self.bound.model.graph.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run on arrays. Keys are graph-input names, dtypes and ranks as the graph declares them.

        Raises:
            InputError: an input is missing, unknown, or of the wrong dtype or shape.
        """
        return self.session.run(feeds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it as the module was called: tensors in, the module's own output structure out.

        A model that came from ONNX has no module: positional tensors are its graph inputs in order,
        keyword tensors go by name, and a dict of tensors by output name comes back. A decoder needs its
        ``input_ids`` alone: mask, positions and an empty cache follow from them.
        """
        if self.signature is not None:
            tensors: Mapping[str, torch.Tensor] = flatten_inputs(self.signature, args, kwargs)
        else:
            tensors = self._name_arguments(args, kwargs)
        outputs = self._run_tensors({name: torch.as_tensor(tensor) for name, tensor in tensors.items()})
        if self.eviction is not None:
            # Of these queries an eviction reads: the module has no such outputs.
            for value in self.eviction.graph.inputs:
                outputs.pop(str(value.name), None)
        if self.signature is None:
            return outputs
        return unflatten_outputs(self.signature, list(outputs.values()))

    def _run_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        session = self.session
        if isinstance(session, TorchSession) and tensors.keys() == set(self.input_names):
            return session.run_torch(tensors)  # They stay on their device, and gradients flow.
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        feeds = completed(arrays, self.bound.model)
        if isinstance(session, TorchSession):
            return session.run_torch({**feeds, **tensors})
        return session.run_torch(feeds)

    def _name_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.input_names):
            raise InputError(
                f"expected at most {len(self.input_names)} inputs {list(self.input_names)}, found {len(args)}"
            )
        return {**dict(zip(self.input_names, args, strict=False)), **kwargs}

    def generate(
        self,
        input_ids: Any,
        max_new_tokens: int = 128,
        *,
        attention_mask: Any = None,
        decoder: Decoder | None = None,
        fast_prefill: bool = False,
        stream: Callable[[Array], None] | None = None,
        **settings: Any,
    ) -> Array:
        """Generate text with a decoder, by its own kernels and cache.

        Args:
            input_ids: [batch, length] prompts, padded on the left where lengths differ; a list of lists of
                different lengths is padded here.
            max_new_tokens: that are generated at most.
            attention_mask: [batch, length], 0 for padding; all ones if absent.
            decoder: from `decoder`, whose cache is gone on with: what it holds of the prompts is not run
                again. A new one if absent.
            fast_prefill: as of `decoder`, for a new one.
            stream: called with the new tokens [batch] after each step.
            settings: of `planish.runtime.generate.Generation`: ``sampling``, ``stop_tokens``, ``draft``, ….

        Returns:
            [batch, length + new], prompts and what was generated.

        Raises:
            InputError: no decoder; prompts that are empty, longer than the model's positions, or hold unknown
                tokens; no room in the cache.
        """
        ids, mask = prompts(input_ids, attention_mask)
        generation = Generation(max_new_tokens=max_new_tokens, **settings)
        if decoder is None:
            new = 0 if self.eviction is not None else max_new_tokens
            decoder = self.decoder(batch=len(ids), capacity=ids.shape[1] + new, fast_prefill=fast_prefill)
        found = [ids]
        for tokens in generate(decoder, ids, mask, generation):
            if stream is not None:
                stream(tokens)
            found.append(tokens[:, None])
        return np.concatenate(found, axis=1)

    def decoder(self, *, batch: int = 1, capacity: int = 2048, fast_prefill: bool = False) -> Decoder:
        """An empty cache, to `generate` with more than once: a conversation, or a beginning that texts share.

        Args:
            batch: sequences.
            capacity: tokens that it has room for, prompts and answers together.
            fast_prefill: run prompts by kernels that were chosen for many tokens at a time, as int8 ones for
                weights of 4 bits, and what follows by kernels chosen for one, instead of all by kernels that
                are a compromise. This takes the memory of a second set of weights, and numbers may differ
                in the last bits, as between any two kernels.

        Raises:
            InputError: the model has no cache, or was saved without kernels for prompts.
        """
        eviction = None
        if self.eviction is not None:
            eviction = Eviction(self._eviction_session, self.eviction)
        return Decoder(
            self._token_session if fast_prefill else self.session,
            self._token_bound.model if fast_prefill else self.bound.model,
            batch=batch,
            capacity=capacity,
            eviction=eviction,
            prefill=self._prefill_session if fast_prefill else None,
        )

    @property
    def has_fast_prefill(self) -> bool:
        """Whether there are kernels of their own for prompts: not in files that were saved without them."""
        return self._path is None or prefill_file(self._path) is not None

    def _bound_for(self, rows: int) -> BoundModel:
        bound = self.target.for_rows(rows).bind(self.model)
        note_binding(bound)
        return bound

    @functools.cached_property
    def _token_bound(self) -> BoundModel:
        """For one token at a time, where prompts have kernels of their own."""
        return self._bound_for(1) if self._path is None else self.bound

    @functools.cached_property
    def _token_session(self) -> Executor:
        return open_executor(self._token_bound, self.target)

    @functools.cached_property
    def _prefill_bound(self) -> BoundModel:
        if self._path is None:
            return self._bound_for(_PROMPT_ROWS)
        file = prefill_file(self._path)
        if file is None:
            raise InputError(
                f"fast_prefill: {self._path} was saved without kernels for prompts",
                hint="save it to a folder with fast_prefill=True",
            )
        return read_prefill(file)

    @functools.cached_property
    def _prefill_session(self) -> Executor:
        return open_executor(self._prefill_bound, self.target)

    def memory(
        self, batch: int = 1, length: int = 2048, *, chunk: int = 512, fast_prefill: bool = False
    ) -> Memory:
        """What generating takes, computed from the graph; see `planish.runtime.generate.memory`.

        Args:
            batch: sequences.
            length: tokens of a sequence, prompt and answer together.
            chunk: tokens of the prompt that are run at a time.
            fast_prefill: with kernels of their own for prompts, as of `decoder`.

        Raises:
            InputError: the model has no cache, or was saved without kernels for prompts.
        """
        bound = self._token_bound if fast_prefill else self.bound
        prefill = self._prefill_bound.model if fast_prefill else None
        return memory(bound.model, batch=batch, length=length, chunk=chunk, prefill=prefill)

    @functools.cached_property
    def _eviction_session(self) -> Executor:
        assert self.eviction is not None
        return open_executor(BoundModel(model=self.eviction), self.target)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer: Any = None,
        fast_prefill: bool = False,
        external_data: bool | None = None,
    ) -> Path:
        """Write the bound model as one ONNX file, or as a folder with all that a decoder needs.

        The files appear whole or not at all. Weights over 2 GB, or on request, go to ``path.data``.

        Args:
            path: ``….onnx`` for one file. Everything else is a folder, made if it is not there, with
                ``model.onnx``, and for decoders traced from transformers ``genai_config.json``.
            tokenizer: for a folder, a tokenizer of transformers or a folder with its files.
            fast_prefill: for a decoder's folder, write the kernels for prompts (see `decoder`) beside those
                for one token, as ``prefill.onnx``: about as large again.
            external_data: write the weights to a second file; None: only if they are too large for one.

        Returns:
            The path of the ONNX file.

        Raises:
            ModelError: it cannot be written.
            InputError: a tokenizer or kernels for prompts for a single file, kernels for prompts without a
                cache, or no tokenizer was found.
        """
        path = Path(path)
        if path.suffix == ".onnx":
            if tokenizer is not None:
                raise InputError(
                    f"a tokenizer goes into a folder, found the file {path}", hint=f"save to {path.parent}"
                )
            if fast_prefill:
                raise InputError(
                    f"kernels for prompts go into a folder, found the file {path}",
                    hint=f"save to {path.parent}",
                )
            if self.eviction is not None:
                raise InputError(
                    f"a decoder that evicts is two models, found the file {path}",
                    hint=f"save to {path.parent}",
                )
            save(self.bound.model, path, external_data=external_data)
            return path
        if fast_prefill:
            cache_slots(self.bound.model)  # Only what has a cache has prompts.
        save_folder(
            self._token_bound if fast_prefill else self.bound,
            path,
            eviction=self.eviction,
            prefill=self._prefill_bound if fast_prefill else None,
            tokenizer=tokenizer,
            external_data=external_data,
        )
        return path / MODEL_FILE

    def save_hub(
        self,
        folder: str | os.PathLike[str],
        *,
        name: str | None = None,
        config: Any = None,
        tokenizer: Any = None,
        external_data: bool | None = None,
    ) -> Path:
        """Write the bound model into a folder in the layout of the Hugging Face hub.

        That is ``onnx/model_q4.onnx`` or as the hub's convention calls a model with such weights (see
        `hub_file_names`), and ``config.json`` beside that folder. Save several models into one folder, each
        under its name. Compile for the target ``portable`` where the file shall run on any runtime.

        Args:
            folder: made if it is not there; other files in it stay.
            name: of the file; None for the convention's.
            config: a configuration of transformers, or a folder with ``config.json``; None for the one that
                the model was traced with, or that is in the folder. Without any, none is written.
            tokenizer: one of transformers, or a folder with its files.
            external_data: write the weights to a second file; None: only if they are too large for one.

        Returns:
            The path of the ONNX file.

        Raises:
            ModelError: the folder cannot be written.
            InputError: the convention has no name for the model, tokens of its cache are evicted, or there is
                no configuration or tokenizer in what was given.
        """
        if self.eviction is not None:
            raise InputError(
                "a decoder that evicts is two models, which the hub's layout has no names for",
                hint="save it to a folder of its own with save()",
            )
        return save_hub(
            self.bound,
            self.model,
            Path(folder),
            name=name,
            config=config,
            tokenizer=tokenizer,
            external_data=external_data,
        )

    @property
    def hub_file_names(self) -> tuple[str, ...]:
        """The names that the hub's convention has for the model, the usual one first.

        Raises:
            InputError: there is no name for how its weights are stored, or it has none.
        """
        return hub_file_names(self.model)

    def web_support(self, provider: Provider = "webgpu") -> WebSupport:
        """Which nodes of the bound model onnxruntime-web has no kernels for; see `planish.codegen.web`.

        Args:
            provider: ``wasm`` or ``webgpu``.
        """
        return web_support(self.bound.model, provider)

    def benchmark(
        self, feeds: Mapping[str, Array], *, against: CompiledModel | None = None, repeats: int = 20
    ) -> dict[str, Latency]:
        """Latency of one call on these inputs; interleaved with ``against`` when given.

        Returns:
            ``{"model": …}``, and ``"against"`` beside it: medians over ``repeats`` calls, in milliseconds.
        """
        runs = {"model": functools.partial(self.session.run_torch, feeds)}
        if against is not None:
            runs["against"] = functools.partial(against.session.run_torch, feeds)
        return interleaved_latency(runs, repeats=repeats)

    def compare(self, other: Any, inputs: Mapping[str, Array]) -> dict[str, Difference]:
        """How far this model's outputs are from another's on the same inputs, by output name.

        Args:
            other: a `CompiledModel`, or any callable from feeds to a mapping of outputs (the reference).
            inputs: arrays by graph-input name.
        """
        reference = other.run(inputs) if isinstance(other, CompiledModel) else other(inputs)
        return compare_outputs(self.run(inputs), reference)
