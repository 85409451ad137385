"""Small FP8 modules, sealed as the loader leaves them."""

from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize
from octavo.integrations.experts import experts_layout, gate_of
from octavo.nn.experts import Float8Experts, adopt_float8
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings
from octavo.ops.weights import storage

BLOCK = ScaleLayout("block", (32, 64))


def float8_linear(
    rows: int = 80, columns: int = 96, layout: ScaleLayout = BLOCK, *, bias: bool = False
) -> Float8Linear:
    layer = Float8Linear(columns, rows, layout=layout, bias=bias, static_input=False, settings=Settings())
    codes, scales = storage(quantize(torch.randn(rows, columns), layout))
    layer.weight = nn.Parameter(codes[0], requires_grad=False)
    layer.weight_scale = nn.Parameter(scales[0], requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(rows))
    layer.seal()
    return layer


def float8_experts(
    num_experts: int = 4, hidden: int = 96, intermediate: int = 80, layout: ScaleLayout = BLOCK
) -> Float8Experts:
    config: Any = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=intermediate, num_experts=num_experts)
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    facts = experts_layout(module)
    assert facts is not None
    layouts = dict.fromkeys(facts.names, layout)
    experts = adopt_float8(module, facts, gate_of(module), Settings(), layouts, set())
    for name, parts in ((facts.up_name, 2), (facts.down_name, 1)):
        rows, columns = experts.get_parameter(name).shape[1:]
        codes, scales = storage(quantize(torch.randn(num_experts, rows, columns) * 0.1, layout, parts=parts))
        experts.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        experts.register_parameter(f"{name}_scale", nn.Parameter(scales, requires_grad=False))
    experts.seal()
    return experts


class Block(nn.Module):
    """An FP8 linear layer with LoRA beside it, then FP8 experts with factors of their own: everything that trains is
    float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = float8_linear(96, 96)
        self.lora_A = nn.Parameter(torch.randn(4, 96) * 0.1)
        self.lora_B = nn.Parameter(torch.randn(96, 4) * 0.1)
        self.experts = float8_experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x) + x @ self.lora_A.T.to(x.dtype) @ self.lora_B.T.to(x.dtype)
        index = torch.arange(x.shape[0])[:, None].add(torch.tensor([0, 1])) % self.experts.num_experts
        p = torch.full(index.shape, 0.5, dtype=x.dtype)
        y: torch.Tensor = self.experts(x, index, p)
        return y


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    """Codes and scales of every FP8 module inside ``module``, copied."""
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, Float8Linear | Float8Experts):
            for parameter_name, parameter in part.named_parameters(recurse=False):
                if not parameter_name.endswith("bias"):
                    found[f"{name}.{parameter_name}"] = parameter.detach().clone()
    return found
