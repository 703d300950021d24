"""Which library does a docstring come from? A classifier on top of the sentence-embedding model.

Text and labels are found on every machine that runs this: the docstrings of installed libraries, read from
their source files without importing them. Kept is the prose before the first section, without code, roles and
the libraries' own names; what is repeated counts once. Other versions of the libraries give another data set.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import itertools
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentence_model
import tokenizers
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from tasks_classifier import LABELS, Data, Task, batches, fit, inputs, trained

LIBRARIES = ("networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
_PER_LIBRARY, _MOST_PER_FILE = 500, 8
"""Few from each file, so that what is learned is the library and not a file's subject."""
_FOREIGN = ("test", "extern", "vendor")
"""Parts of names of folders and files that hold tests and other libraries' code."""
_FEWEST_WORDS = 15
_TOKENS = 64
_TEST_SHARE = 0.25
_BATCH = 8
"""Of the deployment."""
_STEPS, _DISTILL = 150, "batch=32,learning_rate=5e-5,task=1.0"

_NAMES = re.compile(
    r"\b(networkx|nx|numpy|np|numpydoc|ndarrays?|scipy|sklearn|scikit-learn|scikit|sympy|pytorch|torch\w*|aten"
    r"|transformers?|hugging\s?face|hf)\b",
    re.IGNORECASE,
)
_SECTION = re.compile(
    r"^\s*([-=~]{3,}|>>>|\.\. |@|(parameters|args|arguments|returns?|examples?|usage|notes?|explanation"
    r"|references|raises|attributes|see also|yields)\s*:{0,2}\s*$)",
    re.IGNORECASE,
)
_MARKUP = re.compile(r":[\w:]+:(?=`)|[`*~|\[\]{}<>]|https?://\S+")


class TextClassifier(torch.nn.Module):
    """Sentence embedding, then a linear layer.

    ``forward(input_ids [batch, sequence], attention_mask) -> {"logits": [batch, classes]}``.
    """

    def __init__(self, embedder: torch.nn.Module, classes: int, width: int = 384) -> None:
        super().__init__()
        self.embedder = embedder
        self.head = torch.nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify."""
        return {"logits": self.head(self.embedder(input_ids, attention_mask))}


def docstrings(library: str) -> list[str]:
    """The prose of a library's docstrings, no text twice, in an order that only names decide."""
    found: dict[str, str] = {}
    for path in _files(library):
        for text in itertools.islice(_prose(path), _MOST_PER_FILE):
            # Copies differ late if they differ: one text for each beginning.
            found.setdefault(" ".join(text.lower().split()[:8]), text)
        if len(found) >= _PER_LIBRARY:
            break
    return list(found.values())[:_PER_LIBRARY]


def _files(library: str) -> list[Path]:
    spec = importlib.util.find_spec(library)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{library} is not installed, and its docstrings are part of the data")
    root = Path(spec.origin).parent
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    chosen = [name for name in names if not any(part in name for part in _FOREIGN)]
    return [root / name for name in sorted(chosen, key=lambda name: hashlib.sha256(name.encode()).digest())]


def _prose(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
            text = clean(ast.get_docstring(node) or "")
            if len(text.split()) >= _FEWEST_WORDS:
                yield text


def clean(docstring: str) -> str:
    """The prose before the first section, without markup and the libraries' names."""
    lines = docstring.splitlines()
    end = next((index for index, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    if end < len(lines) and re.match(r"^\s*[-=~]{3,}", lines[end]):
        end -= 1  # an underline: the section's title stands above it
    prose = _MARKUP.sub(" ", " ".join(lines[: max(end, 0)]))
    return " ".join(_NAMES.sub(" ", prose).split())


def examples() -> tuple[list[str], np.ndarray[Any, Any]]:
    """All texts and the index of each one's library."""
    texts = [docstrings(library) for library in LIBRARIES]
    labels = np.repeat(np.arange(len(texts)), [len(found) for found in texts])
    return list(itertools.chain.from_iterable(texts)), labels.astype(np.int64)


def tokenised(texts: Sequence[str]) -> Data:
    """Token ids and masks, [texts, 64]."""
    tokenizer = tokenizers.Tokenizer.from_file(str(sentence_model.model_folder() / "tokenizer.json"))
    tokenizer.enable_padding(length=_TOKENS)
    tokenizer.enable_truncation(_TOKENS)
    encoded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([item.ids for item in encoded], np.int64),
        "attention_mask": np.array([item.attention_mask for item in encoded], np.int64),
    }


def text_classifier(folder: Path, epochs: int | None, say: Callable[[str], None]) -> Task:
    """The classifier, trained or read from ``folder``."""
    texts, labels = examples()
    data = {**tokenised(texts), LABELS: labels}
    chosen, held = train_test_split(
        np.arange(len(texts)), test_size=_TEST_SHARE, stratify=labels, random_state=0
    )
    training = {name: array[chosen] for name, array in data.items()}
    module = TextClassifier(sentence_model.load_module(), len(LIBRARIES))

    def train() -> None:
        _fit_head(module, training, say)
        # The encoder learns, too: else labels in distillation would let a pruned model overtake the dense.
        fit(module, training, epochs=epochs or 2, batch=32, learning_rate=5e-5, say=say)

    return Task(
        name="text",
        title="library of a docstring",
        module=trained(module, folder / "weights.pt", train),
        training=training,
        test={name: array[held] for name, array in data.items()},
        batch=_BATCH,
        sequence=_TOKENS,
        steps=_STEPS,
        distill=_DISTILL,
    )


def _fit_head(module: TextClassifier, training: Data, say: Callable[[str], None]) -> None:
    """Logistic regression on the frozen embeddings: where training of the whole begins."""
    with torch.no_grad():
        embeddings = torch.cat(
            [
                module.embedder(**{name: torch.from_numpy(array) for name, array in part.items()})
                for part in batches(inputs(training))
            ]
        )
        regression = LogisticRegression(C=10.0, max_iter=1000).fit(embeddings.numpy(), training[LABELS])
        module.head.weight.copy_(torch.from_numpy(regression.coef_))
        module.head.bias.copy_(torch.from_numpy(regression.intercept_))
    accuracy = regression.score(embeddings.numpy(), training[LABELS])
    say(f"head on frozen embeddings: {accuracy:.1%} of the training texts")
