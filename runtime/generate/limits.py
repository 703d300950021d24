"""What prompts a decoder can take: its vocabulary, and how long a text it was made for."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...ir.decoder_facts import DecoderFacts
from ...ir.errors import InputError
from ...ir.views.values import static_dim

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Limits:
    """One model's.

    Attributes:
        vocabulary: tokens are below it; None if the model does not say.
        positions: tokens of a text; None if there is no limit, or the model does not say.
        gives_all_logits: and not those of the last token alone.
    """

    vocabulary: int | None
    positions: int | None
    gives_all_logits: bool = True

    @classmethod
    def of(cls, model: ir.Model) -> Limits:
        """From the facts in a model's metadata; else from the shape of its logits."""
        facts = DecoderFacts.read(model)
        logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
        gives_all = static_dim(logits, 1) != 1
        if facts is not None:
            return cls(facts.vocabulary, facts.positions, gives_all)
        return cls(static_dim(logits, -1), None, gives_all)

    def check(self, ids: Tokens, mask: Tokens, max_new_tokens: int) -> None:
        """Refuse prompts [batch, length] that the model cannot read, or go on from so far.

        Raises:
            InputError: says which prompt, and which token of it.
        """
        self._check_tokens(ids)
        if self.positions is None:
            return
        lengths = mask.sum(axis=1)
        longest = int(lengths.argmax())
        length = int(lengths[longest])
        if length > self.positions:
            raise InputError(
                f"prompt {longest} has {length} tokens, the model has {self.positions} positions",
                hint="shorten the prompt",
            )
        # The last token is given, but not run.
        if length + max_new_tokens - 1 > self.positions:
            raise InputError(
                f"prompt {longest} of {length} tokens and {max_new_tokens} new ones are more than the "
                f"model's {self.positions} positions",
                hint=f"max_new_tokens can be {self.positions - length + 1} here",
            )

    def _check_tokens(self, ids: Tokens) -> None:
        if self.vocabulary is None:
            return
        outside = np.argwhere((ids < 0) | (ids >= self.vocabulary))
        if len(outside):
            row, column = (int(index) for index in outside[0])
            raise InputError(
                f"prompt {row}, token {column}: expected an id from 0 to {self.vocabulary - 1}, "
                f"found {int(ids[row, column])}",
                hint="was the text tokenised for another model?",
            )
