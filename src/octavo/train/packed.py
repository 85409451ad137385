"""Attention over packed rows without a mask: every example attends to itself, at the cost of its own length.

A dense mask of a row of 32,768 tokens takes 1.07 GB. trl tells where examples begin (``cu_seq_lens_q``), and this
function gives that to torch's variable-length flash attention; where that cannot run, it attends example by example.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

from octavo.errors import ConfigError

PACKED = "octavo_packed"
# What other attention functions take that this one would have to ignore.
_NOT_HERE = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let ``model`` attend within the examples of a packed row.

    Raises:
        ConfigError: the model's attention is one that this function does not compute.
    """
    AttentionInterface.register(PACKED, packed_attention)
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None or getattr(config, "sliding_window", None):
        raise ConfigError(
            f"`data.packing`: {type(model).__name__} has a sliding window or caps its attention scores, which octavo's "
            "packed attention does not compute. Set `model.attention: sdpa`, which builds a mask of the row's length "
            "squared, or `data.packing: false`."
        )
    model.set_attn_implementation(PACKED)
    # transformers warns and goes on where a model's own code computes its attention.
    if config._attn_implementation != PACKED:
        raise ConfigError(
            f"`data.packing`: {type(model).__name__} takes no attention function from outside. Set "
            "`model.attention: sdpa`, or `data.packing: false`."
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each example of a row.

    ``query`` [B, heads, S, D], ``key`` and ``value`` [B, kv heads, S, D or D']: rows of queries and keys are the same
    tokens. ``cu_seq_lens_q`` [examples + 1] int32: where examples begin in the one row, and its end; without it each
    row is one example, padded on the right if at all. Returns [B, S, heads, D'].
    """
    if attention_mask is not None:
        raise ValueError(f"{PACKED} attention takes no mask, and got one of shape {tuple(attention_mask.shape)}.")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"{PACKED} attention is for training: {query.shape[2]} queries met {key.shape[2]} keys. Call "
            "model.set_attn_implementation('sdpa') before generating."
        )
    for name in _NOT_HERE:
        if kwargs.get(name) is not None:
            raise ValueError(f"{PACKED} attention does not compute {name}; {type(module).__name__} asked for it.")
    if cu_seq_lens_q is None or cu_seq_lens_q.numel() == 2:
        attended = _causal(query, key, value, scaling, dropout)
    elif _takes_varlen(query, value, dropout):
        assert max_length_q is not None, "whoever gives the starts of examples gives the longest of them"
        return _varlen(query, key, value, cu_seq_lens_q, max_length_q, scaling), None
    else:
        bounds = cu_seq_lens_q.tolist()
        pieces = [
            _causal(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], scaling, dropout)
            for start, end in pairwise(bounds)
            if end > start
        ]
        attended = torch.cat(pieces, 2)
    return attended.transpose(1, 2).contiguous(), None


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    # by a branch: in a compiled layer numbers of heads may be symbols, and a comparison of those is no bool
    options: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, scale=scaling, is_causal=True, **options
    )


def _takes_varlen(query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length kernel computes this: it has no dropout, and one width for all three."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and dropout == 0
    )


# Looked up here, because a compiled layer cannot.
_VARLEN_SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scaling: float | None) -> Tensor:
    q_THD, k_THD, v_THD = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    # Releases differ: some want to be told that keys are shared, others have no word for it.
    if groups > 1 and _VARLEN_SHARES_KEYS:
        options["enable_gqa"] = True
    elif groups > 1:
        k_THD, v_THD = (tensor.repeat_interleave(groups, 1) for tensor in (k_THD, v_THD))
    attended = varlen_attn(
        q_THD, k_THD, v_THD, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), **options
    )
    assert isinstance(attended, Tensor)
    return attended.view(query.shape[0], query.shape[2], *attended.shape[1:])
