"""Tiny models twice: on octavo's modules with FP8 storage, and the same weights dequantized in stock transformers."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
from torch import Tensor, nn
from transformers import (
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from octavo.formats.facts import ScaleLayout
from octavo.formats.weight import quantize
from octavo.integrations.experts import experts_layout, gate_of
from octavo.integrations.peft import install
from octavo.nn.experts import adopt_dense, adopt_float8
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings
from octavo.ops.weights import storage

BLOCK = ScaleLayout("block", (64, 32))
CHANNEL = ScaleLayout("channel")
LAYOUTS = {"block": BLOCK, "channel": CHANNEL}
VOCABULARY = 96

ATTENTION = {
    "glm": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "qwen": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
DENSE = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
SHARED = [f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]
PARAMETERS = {"glm": [*STACKS, *DENSE, *SHARED], "qwen": [*STACKS, *DENSE]}


def glm(**changes: object) -> PreTrainedModel:
    """MLA attention, layer 0 dense, a shared expert; no size is a multiple of a block."""
    return Glm4MoeLiteForCausalLM(
        Glm4MoeLiteConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 72,
                "intermediate_size": 80,
                "moe_intermediate_size": 40,
                "num_hidden_layers": 3,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "n_routed_experts": 6,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "n_group": 1,
                "topk_group": 1,
                "kv_lora_rank": 24,
                "q_lora_rank": 40,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 16,
                "v_head_dim": 24,
                "max_position_embeddings": 64,
                "initializer_range": 0.1,
                "tie_word_embeddings": False,
                "pad_token_id": 0,
                **changes,
            }
        )
    )


def qwen(**changes: object) -> PreTrainedModel:
    """Grouped-query attention with norms on q and k, layer 0 dense, no shared expert."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 72,
                "intermediate_size": 80,
                "moe_intermediate_size": 40,
                "num_hidden_layers": 2,
                "mlp_only_layers": [0],
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_experts": 6,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
                "max_position_embeddings": 64,
                "initializer_range": 0.1,
                "tie_word_embeddings": False,
                "pad_token_id": 0,
                **changes,
            }
        )
    )


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"glm": glm, "qwen": qwen}


class Pair(NamedTuple):
    """``ours``: FP8 on octavo's modules. ``stock``: the same weights dequantized, untouched by octavo."""

    ours: PreTrainedModel
    stock: PreTrainedModel


def pair(
    family: str,
    layout: ScaleLayout = BLOCK,
    *,
    dtype: torch.dtype = torch.float32,
    plain: Callable[[str], bool] = lambda name: False,
    **changes: object,
) -> Pair:
    """A model of ``family`` as a pair. ``plain``: names of modules that stay unquantized."""
    install()
    torch.manual_seed(7)
    stock = FAMILIES[family](**changes).to(dtype).eval()
    ours = copy.deepcopy(stock)
    for name, module in list(ours.named_modules()):
        kept = plain(name) or name.endswith("lm_head")
        twin = stock.get_submodule(name)
        if isinstance(module, nn.Linear) and not kept:
            ours.set_submodule(name, float8_linear(module, layout))
            twin.weight.data = ours.get_submodule(name).dequantize(dtype)
        elif (found := experts_layout(module)) is not None:
            if kept:
                adopt_dense(module, found, gate_of(module), Settings())
            else:
                float8_experts(module, twin, layout)
    stock.set_experts_implementation("eager")
    return Pair(ours, stock)


def float8_linear(linear: nn.Linear, layout: ScaleLayout) -> Float8Linear:
    """``linear`` quantized."""
    float8 = Float8Linear(
        linear.in_features,
        linear.out_features,
        layout=layout,
        bias=linear.bias is not None,
        static_input=False,
        settings=Settings(),
    )
    codes, scales = storage(quantize(linear.weight, layout))
    _fill(float8, "weight", codes[0], scales[0])
    float8.seal()
    return float8


def float8_experts(module: nn.Module, twin: nn.Module, layout: ScaleLayout) -> None:
    """Quantize the stacks of ``module`` in place, and give ``twin`` what they dequantize to."""
    found = experts_layout(module)
    weights = {
        name: quantize(getattr(module, name), layout, parts=found.parts if name == found.up_name else 1)
        for name in found.names
    }
    dtype = module.down_proj.dtype
    adopted = adopt_float8(module, found, gate_of(module), Settings(), dict.fromkeys(found.names, layout), set())
    for name, weight in weights.items():
        _fill(adopted, name, *storage(weight))
        getattr(twin, name).data = weight.dequantize(dtype)
    adopted.seal()


def _fill(module: nn.Module, name: str, codes: Tensor, scales: Tensor) -> None:
    module.register_parameter(name, nn.Parameter(codes.contiguous(), requires_grad=False))
    module.register_parameter(f"{name}_scale", nn.Parameter(scales.contiguous(), requires_grad=False))


def config_for(family: str, **changes: object) -> peft.LoraConfig:
    """A user's own configuration that reaches every layer: attention by modules, the rest by parameters."""
    return peft.LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "task_type": "CAUSAL_LM",
            "target_modules": list(ATTENTION[family]),
            "target_parameters": list(PARAMETERS[family]),
            "rank_pattern": {r"experts\.(gate_up_proj|down_proj)": 2},
            **changes,
        }
    )


def randomize(model: nn.Module, seed: int = 3) -> nn.Module:
    """Give every LoRA factor of ``model`` a value that depends on its name alone, so that no gradient is zero."""
    for index, (_, parameter) in enumerate(sorted(factors(model).items())):
        draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1000 * seed + index))
        parameter.data.copy_(draw * 0.1)
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the loss on :func:`tokens`, by name, of what trains."""
    model.zero_grad(set_to_none=True)
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def sealed(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the codes and scales of ``model``, by name without peft's wrappers."""
    return {
        bare(name): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.dtype in (torch.uint8, torch.int32)
    }


def bare(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
