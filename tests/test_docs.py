"""Every Python snippet of README.md and docs/ runs, each in a process of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
_FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a snippet downloads; here a small model of the same kind stands in for it.
DOWNLOADED = "Qwen/Qwen3-0.6B"


def snippets():
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for match in _FENCE.finditer(path.read_text()):
            line = path.read_text()[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{path.relative_to(ROOT)}:{line}")


def byte_tokenizer(special=None):
    """A tokenizer of bytes, with special tokens by their roles; a text begins with bos_token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = special or {}
    tokenizer.add_special_tokens(list(special.values()))
    if bos := special.get("bos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """A Qwen3 of random weights with a tokenizer of bytes."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tmp_path_factory.mktemp("qwen3")
    byte_tokenizer().save_pretrained(path)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("snippet", list(snippets()))
def test_snippet(snippet, request, tmp_path):
    if DOWNLOADED in snippet:
        snippet = snippet.replace(DOWNLOADED, str(request.getfixturevalue("small_model")))
    script = tmp_path / "snippet.py"
    script.write_text(snippet)
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr


def test_five_minutes():
    script = ROOT / "examples" / "five_minutes.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = re.findall(r"^(8 bit) *: .* the first (\d+) of (\d+) characters", result.stdout, re.M)
    assert [(name, same) for name, same, length in said if same == length] == [("8 bit", "60")]
    errors = re.findall(r"^(\d) bit, .* error ([0-9.]+)$", result.stdout, re.MULTILINE)
    bounds = {"8": 0.03, "4": 0.2, "2": 1.0}
    assert [bits for bits, error in errors if float(error) < bounds[bits]] == ["8", "4", "2"]
