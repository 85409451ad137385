"""Attention of one new token per sequence over a cache of fixed length: the heads that share keys are rows of one
product, so that keys are never repeated.

Legend: ``B`` sequences, ``H`` heads, ``N`` heads of keys, ``S`` positions of the cache, ``D`` size of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from octavo.integrations import latent_attention

NAME = "octavo_decode"


def attention(
    module: nn.Module,
    query_BHQD: Tensor,
    key_BNSD: Tensor,
    value_BNSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, 1, H, D], as transformers' attention functions give it; ``attention_mask``: bool [B, 1, 1, S].

    Layers that hand over latents instead of keys and values: see :mod:`octavo.integrations.latent_attention`.
    """
    if latent_attention.hands_latents(module):
        assert scaling is not None
        return latent_attention.attention(module, query_BHQD, key_BNSD, value_BNSD, attention_mask, scaling), None
    B, H, _, D = query_BHQD.shape
    # the heads of one head of keys are consecutive
    rows = query_BHQD.reshape(B, key_BNSD.shape[1], -1, D)
    out = F.scaled_dot_product_attention(rows, key_BNSD, value_BNSD, attn_mask=attention_mask, scale=scaling)
    return out.reshape(B, 1, H, -1), None


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """``model`` attends by :func:`attention` inside the block."""
    AttentionInterface.register(NAME, attention)
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        with latent_attention.latents(model):
            yield
    finally:
        config._attn_implementation = before
