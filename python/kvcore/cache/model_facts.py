"""What a configuration says of a model, as far as caches and dictionaries depend on it."""

from __future__ import annotations

from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticLayer


def model_facts(config: PretrainedConfig) -> dict:
    """What a cache can know of the model it belongs to. Weights are not among it."""
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", None))
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    facts = {name: getattr(text, name, None) for name in names}
    types = getattr(text, "layer_types", None)
    return {**facts, "rope_theta": theta, "layer_types": types and list(types)}


def head_dim_of(config: PretrainedConfig) -> int:
    """Channels of a head of K and V."""
    text = config.get_text_config(decoder=True)
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def kv_heads_of(config: PretrainedConfig) -> int:
    text = config.get_text_config(decoder=True)
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def is_plain_attention(layer: object) -> bool:
    """Whether a cache layer of transformers holds K and V of full attention and nothing else."""
    # Subclasses hold more than K and V, or not all of it.
    return type(layer) in (DynamicLayer, StaticLayer)


def attention_layers(config: PretrainedConfig) -> tuple[int, ...]:
    """The layers of a model that a compressed cache compresses."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return tuple(i for i, layer in enumerate(layers) if is_plain_attention(layer))
