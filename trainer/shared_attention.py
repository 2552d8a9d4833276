"""Attention over rows whose common prefixes went through the model once.

Everything else in a layer looks at a token by itself. Here queries, keys and values are spread to
whole rows, so that plain causal attention is right and needs no mask; the work that it does twice
is small beside what the linear layers are spared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainer.prefixes import Prefixes

IMPLEMENTATION = "shared_prefixes"
"""Its name among transformers' implementations of attention."""
MOST_KEPT = 4.0
"""Spread beyond which the rows are spread once more in the backward pass."""


def can_share(model: Any) -> bool:
    """Whether attention, and full attention only, is all that its layers do across tokens."""
    config = model.config.get_text_config()
    # With `_supports_attention_backend` a model promises to hand attention what it is not told of,
    # as vLLM's own backend needs too: that is how `prefixes` gets there.
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        bool(getattr(model, "_supports_attention_backend", False))
        and kinds == {"full_attention"}
        and (window is None or not getattr(config, "use_sliding_window", True))
    )


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefixes: Prefixes | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention of rows [B, heads, T, d], of `prefixes` where given.

    With them all comes in as [1, heads, U, d] and goes out as [1, U, heads, d].
    """
    if prefixes is None:
        return _attention(module, query, key, value, attention_mask, **options)
    layout = prefixes

    def through_rows(*parts: Tensor) -> Tensor:
        out = [
            _attention(module, *(_spread(part, rows) for part in parts), None, **options)[0]
            for rows in layout.rows
        ]
        flat = torch.cat([part.flatten(0, 1) for part in out])
        return flat.index_select(0, layout.first)[None]

    # Rows that share much are many times what they are spread from: not worth keeping.
    if layout.spread > MOST_KEPT and torch.is_grad_enabled():
        return checkpoint(through_rows, query, key, value, use_reentrant=False), None
    return through_rows(query, key, value), None


def _attention(*parts: Any, **options: Any) -> tuple[Tensor, None]:
    found: tuple[Tensor, None] = sdpa_attention_forward(*parts, **options)
    return found


def _spread(states: Tensor, rows: Tensor) -> Tensor:
    """[1, heads, U, d] -> [B, heads, T, d]."""
    flat = states[0].transpose(0, 1).index_select(0, rows.flatten())
    return flat.view(*rows.shape, *flat.shape[1:]).transpose(1, 2)


AttentionInterface.register(IMPLEMENTATION, attend)
