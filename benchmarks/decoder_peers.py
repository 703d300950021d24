"""Peers of `decode_speed`: the same random Llama in onnxruntime-genai and in llama.cpp.

Both are brought to a context and generate from there, as planish's decoders are in `decode_speed`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers

Tokens = npt.NDArray[np.int64]

CHUNK = 256
"""Tokens of a context that are run at a time."""
ROOM = 128
"""Tokens that every cache has room for behind its context."""


def context_of(config: transformers.LlamaConfig, length: int) -> Tokens:
    """Random tokens, the same for everybody."""
    return np.random.default_rng(0).integers(3, config.vocab_size, length)


def cache_bytes(config: transformers.LlamaConfig, length: int, element: int) -> int:
    """Of keys and values of so many tokens, ``element`` bytes a number."""
    size = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * size * element * length


class GenAI:
    """onnxruntime-genai on a model of four bits that its own builder made.

    Args:
        name: as the table shows it.
        config: of the model.
        folder: with ``genai_config.json``.
    """

    def __init__(self, name: str, config: transformers.LlamaConfig, folder: Path) -> None:
        import onnxruntime_genai as genai

        self.name, self._config, self._genai = name, config, genai
        self._model = genai.Model(str(folder))
        size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".onnx", ".data"))
        self._weights = size - 4 * config.vocab_size * config.hidden_size

    def fill(self, context: int) -> None:
        """Append the context in chunks."""
        self._generator, self._context = self._generator_for(context + ROOM), context
        ids = context_of(self._config, context).astype(np.int32)
        for start in range(0, context, CHUNK):
            self._generator.append_tokens(ids[start : start + CHUNK])
        self.bytes_per_token = self._weights + cache_bytes(self._config, context, 4)

    def burst(self, tokens: int) -> float:
        """Greedy."""
        # The first token comes from the logits of the last prompt token: run it again, outside of the clock.
        self._generator.rewind_to(self._context - 1)
        self._generator.append_tokens(np.array([1], np.int32))
        self._generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(tokens):
            self._generator.generate_next_token()
        return time.perf_counter() - start

    def first_token(self, prompt: Tokens) -> float:
        """All of the prompt at once."""
        generator = self._generator_for(len(prompt) + ROOM)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        return time.perf_counter() - start

    def _generator_for(self, length: int) -> Any:
        parameters = self._genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, do_sample=False)
        return self._genai.Generator(self._model, parameters)


def build_for_genai(source: transformers.LlamaForCausalLM, output: Path) -> Path:
    """Have onnxruntime-genai's builder make a model of four bits in groups of 128; kept in the folder."""
    folder, checkpoint = output / "genai-int4", output / "checkpoint"
    if (folder / "genai_config.json").exists():
        return folder
    source.save_pretrained(checkpoint)
    # The builder copies a tokenizer; nothing is ever tokenized.
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(checkpoint)
    words = ["-m", "", "-i", str(checkpoint), "-o", str(folder), "-c", str(output / "cache")]
    options = ["-p", "int4", "-e", "cpu", "--extra_options", "block_size=128", "accuracy_level=4"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *words, *options]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    return folder


class LlamaCpp:
    """llama.cpp on a GGUF file, called as its C programs call it.

    Args:
        config: of the model.
        path: of the file.
    """

    name = "llama.cpp, Q4_0"

    def __init__(self, config: transformers.LlamaConfig, path: Path) -> None:
        import llama_cpp

        self._config, self._library = config, llama_cpp
        llama_cpp.llama_backend_init()
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silent, ctypes.c_void_p(0))
        options = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot open {path}")
        self._weights = path.stat().st_size - config.vocab_size * config.hidden_size * 18 // 32
        self._context: Any = None

    def fill(self, context: int) -> None:
        """A new cache of float16 for this length, and the tokens in it."""
        self._open(context + ROOM)
        self._length = context
        ids = context_of(self._config, context)
        for start in range(0, context, CHUNK):
            self._decode(ids[start : start + CHUNK])
        self.bytes_per_token = self._weights + cache_bytes(self._config, context, 2)

    def burst(self, tokens: int) -> float:
        """Greedy."""
        token = np.array([1])
        start = time.perf_counter()
        for _ in range(tokens):
            token = np.array([self._decode(token)])
        seconds = time.perf_counter() - start
        self._forget(self._length)
        return seconds

    def first_token(self, prompt: Tokens) -> float:
        """All of the prompt at once."""
        self._open(len(prompt) + ROOM)
        start = time.perf_counter()
        self._decode(prompt)
        return time.perf_counter() - start

    def _open(self, length: int) -> None:
        library = self._library
        if self._context is not None:
            library.llama_free(self._context)
        options = library.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = length, 512, 512
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = library.llama_init_from_model(self._model, options)

    def _decode(self, ids: Tokens) -> int:
        """Run tokens [length]; the likeliest next one."""
        tokens = (self._library.llama_token * len(ids))(*ids.tolist())
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not run the tokens")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._config.vocab_size,)).argmax())

    def _forget(self, length: int) -> None:
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, -1, length, -1)


def write_gguf(source: transformers.LlamaForCausalLM, output: Path) -> Path:
    """Write the model in Q4_0, embedding table and head included; kept in the folder."""
    import gguf

    path, config = output / "model-q4_0.gguf", source.config
    if path.exists():
        return path
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for key, tensor in source.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight",))
        weight = tensor.detach().numpy()
        if weight.ndim == 1:
            writer.add_tensor(name, weight)
            continue
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(_paired(key, weight, config), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path


def _paired(
    key: str, weight: npt.NDArray[np.float32], config: transformers.LlamaConfig
) -> npt.NDArray[np.float32]:
    """Rows of queries and keys as llama.cpp rotates them: i and i + D/2 side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    of_layer = next((count for part, count in heads.items() if part in key), None)
    if of_layer is None:
        return weight
    halves = weight.reshape(of_layer, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
