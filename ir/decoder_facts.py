"""What a decoder's configuration says and its graph does not, kept in the metadata of its file.

The runtime checks prompts against it, and files for onnxruntime-genai are written from it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import onnx_ir as ir

from .errors import ModelError

_KEY = "planish.decoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderFacts:
    """One decoder's.

    Attributes:
        architecture: transformers' ``model_type``, such as ``llama``.
        vocabulary: tokens that its embedding knows.
        hidden_size: of the residual stream.
        heads: of queries in a layer.
        head_size: of a head, before any pruning.
        positions: the longest text that it was made for; None for no limit.
        begin_token: that texts start with; None for none.
        end_tokens: that end a text.
        pad_token: that shorter texts are filled with; None for none.
    """

    architecture: str
    vocabulary: int
    hidden_size: int
    heads: int
    head_size: int
    positions: int | None = None
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    pad_token: int | None = None

    @classmethod
    def of_config(cls, config: Any) -> DecoderFacts:
        """From the configuration of a model of transformers."""
        text = config.get_text_config()
        end = getattr(text, "eos_token_id", None)
        hidden_size, heads = int(text.hidden_size), int(text.num_attention_heads)
        return cls(
            architecture=str(text.model_type),
            vocabulary=int(text.vocab_size),
            hidden_size=hidden_size,
            heads=heads,
            head_size=int(getattr(text, "head_dim", None) or hidden_size // heads),
            positions=getattr(text, "max_position_embeddings", None),
            begin_token=getattr(text, "bos_token_id", None),
            end_tokens=() if end is None else tuple(end) if isinstance(end, list | tuple) else (int(end),),
            pad_token=getattr(text, "pad_token_id", None),
        )

    @classmethod
    def read(cls, model: ir.Model) -> DecoderFacts | None:
        """What is written in a model's metadata; None for models that were not traced with it.

        Raises:
            ModelError: what is there is damaged.
        """
        text = model.metadata_props.get(_KEY)
        if text is None:
            return None
        try:
            fields = json.loads(text)
            return cls(**{**fields, "end_tokens": tuple(fields["end_tokens"])})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ModelError(
                f"metadata {_KEY!r}: expected the facts of a decoder, found {text[:80]!r}",
                hint="compile the model again from its source",
            ) from error

    def write(self, model: ir.Model) -> None:
        """Into a model's metadata, which files keep."""
        model.metadata_props[_KEY] = json.dumps(dataclasses.asdict(self))
