"""``planish generate``: ids and text, and what it says where it cannot."""

import planish
import pytest
import tokenizers
import torch
import transformers
from planish.cli import app
from typer.testing import CliRunner

WORDS = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(61))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    module = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("decoder")
    planish.compile(module, "canonicalize,fuse,raise-cache").save(folder / "llama")
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "llama" / "tokenizer.json"))
    return folder / "llama"


def generate(*arguments):
    return CliRunner().invoke(app, ["generate", *(str(argument) for argument in arguments)])


def expected(folder, ids, new):
    return planish.CompiledModel.open(folder).generate([ids], new)[0, len(ids) :].tolist()


def test_ids(folder):
    result = generate(folder, "--tokens", "5, 6 7", "-n", 6)
    assert result.exit_code == 0
    assert [int(word) for word in result.stdout.split()] == expected(folder, [5, 6, 7], 6)


@pytest.mark.parametrize("draft", [[], ["--draft"]])
def test_text(folder, draft):
    result = generate(folder / "model.onnx", "w2 w3 w4", "-n", 6, *draft)
    assert result.exit_code == 0
    assert result.stdout.split() == [WORDS[token] for token in expected(folder, [5, 6, 7], 6)]


def test_a_seed_draws_the_same_text(folder):
    texts = [
        generate(folder, "w2", "-n", 12, "--temperature", 1.5, "--top-p", 0.9, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a prompt or --tokens"),
        (["w1", "--tokens", "1"], "expected a prompt or --tokens"),
        (["--tokens", "one"], "expected ids such as 1,15043, found 'one'"),
        (["--tokens", "64"], "expected an id from 0 to 63, found 64"),
        (["--tokens", "1", "-n", "70"], "more than the model's 64 positions"),
        (["w1", "--top-k", "5"], "at temperature 0 the likeliest token is taken"),
        (["w1", "--tokenizer", "none.json"], "no tokenizer at none.json"),
    ],
)
def test_mistakes(folder, arguments, message):
    result = generate(folder, *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())


def test_a_file_that_is_no_tokenizer(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    result = generate(folder, "w1", "--tokenizer", tmp_path / "tokenizer.json")
    assert result.exit_code == 1
    assert "is no tokenizer" in " ".join(result.output.split())
