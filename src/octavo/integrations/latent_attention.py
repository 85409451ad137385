"""Multi-head latent attention of one new token without expanding the cache.

transformers keeps the latents ``c`` of keys and values, and expands all of them to every head for each new token:
``k = W_k c``, ``v = W_v c``. The same scores and outputs come from products on the side of the token, by
``q · (W_k c) = (W_kᵀ q) · c`` and ``Σ_s a_s W_v c_s = W_v Σ_s a_s c_s``. LoRA stays apart: ``W`` is never added to.

Legend: ``B`` sequences, ``H`` heads, ``S`` positions of the cache, ``C`` size of a latent, ``P`` of the part of a key
with its position, ``D`` and ``V`` of the parts of a key and a value that come from the latent, ``R`` LoRA rank.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper as StockParamWrapper
from torch import Tensor, nn

from octavo.integrations.adoption import ParamWrapper
from octavo.nn.linear import Float8Linear

# Classes of transformers whose expansion is what the formulas say; a test compares each with its own.
CLASSES = ("Glm4MoeLiteAttention", "DeepseekV3Attention")


def hands_latents(module: nn.Module) -> bool:
    """Whether the layer ``module`` gives latents to its attention function now."""
    return "expand_kv" in vars(module)


@contextmanager
def latents(model: nn.Module) -> Iterator[None]:
    """Attention layers of ``model`` that can do without their expansion give latents inside the block."""
    with ExitStack() as undo:
        for module in model.modules():
            if type(module).__name__ in CLASSES and _readable(module.get_submodule("kv_b_proj")):
                module.__dict__["expand_kv"] = _as_they_are
                undo.callback(module.__dict__.pop, "expand_kv")
        yield


def attention(
    module: Any, query_BH1Q: Tensor, latent_B1SC: Tensor, rotary_B1SP: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """[B, 1, H, V]: what the layer's own expansion and attention give, up to rounding.

    ``query_BH1Q``: each D + P wide. ``mask``: bool [B, 1, 1, S].
    """
    D, V = module.qk_nope_head_dim, module.v_head_dim
    query_BHD, turned_BHP = query_BH1Q[:, :, 0].split([D, module.qk_rope_head_dim], dim=-1)
    parts = [_Part(module.kv_b_proj, query_BH1Q.dtype), *_factors(module.kv_b_proj)]
    latent_BSC, rotary_BSP = latent_B1SC[:, 0], rotary_B1SP[:, 0]
    query_BHC = _sum([part.on_query(query_BHD, D, V) for part in parts])
    scores_BHS = _scores(query_BHC, latent_BSC).add_(_scores(turned_BHP, rotary_BSP)).mul_(scaling)
    if mask is not None:
        scores_BHS.masked_fill_(~mask[:, 0], float("-inf"))
    seen_BHC = torch.bmm(scores_BHS.softmax(dim=-1).to(latent_BSC.dtype), latent_BSC)
    return _sum([part.on_output(seen_BHC, D, V) for part in parts]).to(query_BH1Q.dtype)[:, None]


def _scores(query_BHX: Tensor, keys_BSX: Tensor) -> Tensor:
    """Products of queries and keys in float32, which a fused kernel for attention would not round either.

    No fused kernel has heads as wide as latents, and the keys are read once here as there.
    """
    query_BHX, keys_BXS = query_BHX.to(keys_BSX.dtype), keys_BSX.transpose(1, 2)
    if keys_BSX.is_cuda and keys_BSX.dtype != torch.float32:
        return torch.bmm(query_BHX, keys_BXS, out_dtype=torch.float32)
    return torch.bmm(query_BHX.float(), keys_BXS.float())


class _Part:
    """The weight of the expansion, [H·(D + V), C], as ``left · right`` with an optional ``right`` [R, C]."""

    def __init__(self, projection: nn.Module | Tensor, dtype: torch.dtype, right_RC: Tensor | None = None) -> None:
        self._left = projection if isinstance(projection, Tensor) else _weight(projection, dtype)
        self._right_RC = right_RC

    def on_query(self, query_BHD: Tensor, D: int, V: int) -> Tensor:
        """``W_kᵀ q``, [B, H, C]."""
        keys_HDX = self._heads(D, V)[:, :D]
        found = torch.einsum("bhd,hdx->bhx", query_BHD.to(keys_HDX.dtype), keys_HDX)
        return found if self._right_RC is None else found @ self._right_RC

    def on_output(self, seen_BHC: Tensor, D: int, V: int) -> Tensor:
        """``W_v`` times the attended latents, [B, H, V]."""
        values_HVX = self._heads(D, V)[:, D:]
        seen = seen_BHC.to(values_HVX.dtype)
        if self._right_RC is not None:
            seen = seen @ self._right_RC.T
        return torch.einsum("bhx,hvx->bhv", seen.to(values_HVX.dtype), values_HVX)

    def _heads(self, D: int, V: int) -> Tensor:
        return self._left.view(-1, D + V, self._left.shape[-1])


def _as_they_are(latent_B1SC: Tensor, rotary_B1SP: Tensor) -> tuple[Tensor, Tensor]:
    return latent_B1SC, rotary_B1SP


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _readable(projection: nn.Module) -> bool:
    """Whether the projection is a product with a weight, plus plain LoRA that can be read off."""
    if isinstance(projection, LoraLinear | ParamWrapper):
        if projection.merged or projection.lora_variant or any(projection.lora_bias.values()):
            return False
        projection = projection.get_base_layer()
    elif isinstance(projection, StockParamWrapper):
        return False
    if isinstance(projection, Float8Linear):
        # fp8 rounds what goes into the product, and the latents do not go into one here
        return projection.bias is None and projection.settings.numerics != "fp8"
    return type(projection) is nn.Linear and projection.bias is None


def _weight(projection: nn.Module, dtype: torch.dtype) -> Tensor:
    base = projection.get_base_layer() if isinstance(projection, LoraLinear | ParamWrapper) else projection
    if isinstance(base, Float8Linear):
        return base.dequantize(dtype)
    assert isinstance(base, nn.Linear)
    return base.weight.to(dtype)


def _factors(projection: nn.Module) -> list[_Part]:
    """``s·B`` and ``A`` of each active adapter."""
    if not isinstance(projection, LoraLinear | ParamWrapper) or projection.disable_adapters:
        return []
    found = []
    for adapter in projection.active_adapters:
        if adapter in projection.lora_A:
            A, B = projection.lora_A[adapter].weight, projection.lora_B[adapter].weight
            found.append(_Part(B * projection.scaling[adapter], B.dtype, A))
    return found
