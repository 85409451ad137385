"""What a transformers experts class is, read off the attributes that its decorator sets.

This is the one place that asks an object what it has: ``use_experts_implementation`` offers no base class to test for.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation
from transformers.integrations import moe

from octavo.nn.experts import ExpertsLayout
from octavo.ops.gates import SWIGLU, Gate, ModelGate

STACKS = ("gate_up_proj", "up_proj", "down_proj")


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a stacked-experts module, ``None`` for any other module."""
    if not all(hasattr(module, name) for name in ("is_concatenated", "is_transposed", "has_gate", "has_bias")):
        return None
    experts = cast(Any, module)
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    if up_name not in module._parameters or "down_proj" not in module._parameters:
        return None
    parts = 2 if experts.has_gate else 1
    return ExpertsLayout(up_name, "down_proj", parts, bool(experts.is_transposed), bool(experts.has_bias))


def why_not_ours(module: nn.Module, *, float8: bool) -> str | None:
    """Why octavo's forward cannot stand in for this experts module's own; ``None`` when it can."""
    experts = cast(Any, module)
    if getattr(experts, "has_post_expert_norm", False):
        return "it normalises each expert's output before the combine"
    biases = tuple(f"{name}_bias" for name in STACKS)
    others = [name for name, _ in module.named_parameters() if name not in (*STACKS, *biases)]
    if others:
        return f"it holds parameters beside its stacks ({', '.join(others[:3])})"
    if float8 and experts.is_transposed:
        return "its stacks are transposed ([E, in, out]), and no FP8 format says how their scales lie"
    if float8 and not experts.is_concatenated:
        return "gate and up are interleaved, and no FP8 format says how their scales lie"
    return None


def gate_of(module: nn.Module) -> Gate:
    """The module's gate: the named SwiGLU where the class uses the standard one with SiLU, else its own code."""
    experts = cast(Any, module)
    if not experts.has_gate:
        return ModelGate(type(experts.act_fn).__name__, experts.act_fn)
    standard = type(module)._apply_gate is moe._default_apply_gate  # type: ignore[attr-defined]
    # a class with a gate of its own may have no ``act_fn``
    if standard and experts.is_concatenated and _is_silu(experts.act_fn):
        return SWIGLU
    return ModelGate(f"{type(module).__name__}._apply_gate", experts._apply_gate)


def _is_silu(function: Any) -> bool:
    return isinstance(function, nn.SiLU | SiLUActivation) or function is F.silu
