"""What the attention layers of a model attend with, seen from beside its forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

_NAME = "kvcore_recording"

# Called with the attention module, q, k, v (after the rotary embedding) and the other arguments.
Recorder = Callable[[Any, Tensor, Tensor, Tensor, dict[str, Any]], None]


@contextlib.contextmanager
def recording(model: Any, record: Recorder) -> Iterator[None]:
    """Within it, `record` sees what each attention layer of `model` attends with.

    The model goes on computing what it did, with ``sdpa`` in the place of ``eager``. Layers that do
    not attend through transformers' attention interface, such as recurrent ones, are not seen.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    previous = model.config._attn_implementation
    attend = ALL_ATTENTION_FUNCTIONS.get(previous, sdpa_attention_forward)

    def recorded(module, query, key, value, attention_mask, **kwargs):
        record(module, query, key, value, kwargs)
        return attend(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_NAME, recorded)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(previous)
