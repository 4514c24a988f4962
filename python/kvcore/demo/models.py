"""The two demo models: their configurations, their byte-level vocabulary and how to load them.

Both are byte-level language models with the associative-recall symbols of `kvcore.demo.data` as
extra tokens, of the same size and with attention heads of 64 channels (4 query heads over 2 KV
heads):

- `hybrid`: Qwen3-Next, Gated DeltaNet and full attention in turn, QK norm, a quarter of each head
  rotated.
- `control`: Llama, full attention in every layer, no QK norm.

`transformers` is imported on first use only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAMES = ("hybrid", "control")
MODELS_DIR = Path(__file__).resolve().parent / "models"

NUM_BYTES = 256
NUM_KEYS = 64
NUM_VALUES = 64
FIRST_KEY = NUM_BYTES
FIRST_VALUE = FIRST_KEY + NUM_KEYS
VOCAB_SIZE = FIRST_VALUE + NUM_VALUES

MAX_POSITIONS = 8192
# At 1e6 the slower half of the 32 rotary pairs turns by about 8 radians at most over 8,192
# positions, so that a key can be matched by content at any distance; the fast pairs still tell
# neighbours apart.
ROPE_THETA = 1e6

_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def build_config(name: str) -> Any:
    """The transformers configuration of model `name`, one of `NAMES`; ValueError for any other."""
    if name == "hybrid":
        from transformers import Qwen3NextConfig

        layers = _SHAPE["num_hidden_layers"]
        return Qwen3NextConfig(
            **_SHAPE,
            intermediate_size=448,
            layer_types=["linear_attention", "full_attention"] * (layers // 2),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "partial_rotary_factor": 0.25,
            },
            linear_key_head_dim=64,
            linear_value_head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            # Dense MLPs everywhere: a model this small has nothing to route, so the expert sizes
            # are unused.
            mlp_only_layers=list(range(layers)),
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        )
    if name == "control":
        from transformers import LlamaConfig

        # 544: the width at which both models have the same number of parameters within 1 %.
        return LlamaConfig(
            **_SHAPE,
            intermediate_size=544,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        )
    raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")


def build(name: str) -> Any:
    """A freshly initialised fp32 model `name` (from torch's global generator), in training mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(build_config(name), attn_implementation="sdpa")


def path(name: str) -> Path:
    """Folder with the weights, configuration and training record of model `name`."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
    return MODELS_DIR / name


def training_record(name: str) -> dict[str, Any]:
    """The training.json of model `name`: data, hyperparameters, curve, measured checks."""
    return json.loads((path(name) / "training.json").read_text())


def load(
    name: str | Path,
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
) -> Any:
    """Model `name` (or a folder that holds one) in evaluation mode.

    The stored weights are bf16; `dtype` ("float32" or "bfloat16") is what they are computed in.
    Float32 represents every stored weight exactly. Raises ValueError for an unknown name or dtype
    and FileNotFoundError where the weights are missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {list(dtypes)}, got {dtype!r}")
    folder = Path(name) if Path(name).is_dir() else path(name)
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no model.safetensors in {folder}")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtypes[dtype], attn_implementation=attn_implementation, local_files_only=True
    )
    return model.to(device).eval()


def encode(text: str | bytes) -> list[int]:
    """Token ids of a str (as UTF-8) or of bytes: one per byte, 0-255."""
    return list(text.encode() if isinstance(text, str) else text)


def decode(ids: Iterable[int]) -> str:
    """Text of token ids; recall symbols print as `<k12>`, `<v3>`, bytes outside UTF-8 as U+FFFD."""
    parts, run = [], bytearray()
    for token in map(int, ids):
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"ids must lie in [0, {VOCAB_SIZE}), got {token}")
        if token < NUM_BYTES:
            run.append(token)
            continue
        parts.append(run.decode(errors="replace"))
        run.clear()
        symbol, first = ("k", FIRST_KEY) if token < FIRST_VALUE else ("v", FIRST_VALUE)
        parts.append(f"<{symbol}{token - first}>")
    return "".join([*parts, run.decode(errors="replace")])


def tokenizer() -> Any:
    """The vocabulary of both models as a tokenizer of transformers: the ids of `encode`.

    Recall symbols are written `<k12>` and `<v3>`. Byte 0 is what the models are padded with, and
    stands for the end of a text, which they have no token for.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # The characters that stand for bytes in byte-level tokenizers: those that print for themselves.
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    spelt = {chr(b) if b in printed else chr(next(others)): b for b in range(NUM_BYTES)}
    end = "\0"
    vocabulary = {end if b == 0 else character: b for character, b in spelt.items()}
    inner = Tokenizer(BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(end, normalized=False)])
    symbols = [f"<k{i}>" for i in range(NUM_KEYS)] + [f"<v{i}>" for i in range(NUM_VALUES)]
    inner.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )
