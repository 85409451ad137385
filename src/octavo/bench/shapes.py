"""The layer that is measured: sizes from flags, from a model's config, or of a model by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from octavo.checkpoint.accounting import open_ledger
from octavo.errors import CheckpointError, ConfigError
from octavo.formats.scheme import ScaleLayout

Kind = Literal["channel", "tensor", "block"]
# how configs spell these
_SPELLINGS = {
    "experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts"),
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer with SwiGLU experts: ``experts`` of ``hidden`` × ``intermediate``, ``top_k`` of them a token."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    layout: ScaleLayout

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SPELLINGS}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name} is {size}; it is at least 1.")
        if self.top_k > self.experts:
            raise ConfigError(f"top_k is {self.top_k}, more than the {self.experts} experts there are.")

    @property
    def code_bytes(self) -> int:
        """Of both stacks."""
        return 3 * self.experts * self.hidden * self.intermediate

    def flops(self, tokens: int) -> float:
        """Of forward and input gradient: the base is frozen, so there is no weight gradient."""
        return 2 * 2 * tokens * self.top_k * 3 * self.hidden * self.intermediate


MODELS = {
    "glm": LayerShape("glm", 64, 4, 2048, 1536, ScaleLayout("channel")),
    "qwen3": LayerShape("qwen3", 128, 8, 2048, 768, ScaleLayout("block", (128, 128))),
}


def layout_of(kind: Kind) -> ScaleLayout:
    """A layout by name; blocks are 128 × 128."""
    return ScaleLayout(kind, (128, 128) if kind == "block" else None)


def shape_of(folder: Path, layout: Kind | None = None) -> LayerShape:
    """The routed experts of the checkpoint in ``folder``; ``layout`` for one that is not quantized, else its own.

    Raises: CheckpointError where the config describes no experts.
    """
    ledger = open_ledger(folder)
    text: Mapping[str, Any] = ledger.config.get("text_config") or ledger.config
    found = {name: _first(text, spellings) for name, spellings in _SPELLINGS.items()}
    if missing := [name for name, value in found.items() if value is None]:
        spelt = " or ".join(_SPELLINGS[missing[0]])
        raise CheckpointError(
            f"config.json of {folder.name} has no {spelt}, so it describes no routed experts to measure. "
            "Give the sizes as --experts, --top-k, --hidden and --intermediate."
        )
    layouts = Counter(weight.layout for name, weight in ledger.quantized.items() if ".experts." in name)
    chosen = layouts.most_common(1)[0][0] if layouts and layout is None else layout_of(layout or "channel")
    sizes = {name: int(value) for name, value in found.items() if value is not None}
    return LayerShape(folder.name, layout=chosen, **sizes)


def _first(config: Mapping[str, Any], spellings: tuple[str, ...]) -> int | None:
    return next((int(config[name]) for name in spellings if isinstance(config.get(name), int)), None)


# measured on one H200: dense bf16 product, device copy
_H200_FLOPS, _H200_BYTES = 790e12, 4.3e12


def floor_ms(shape: LayerShape, tokens: int, device_name: str) -> float | None:
    """The least a layer in bf16 arithmetic can take, forward and input gradient: its FLOPs, or reading its FP8 codes
    twice; ``None`` on a device whose rates nobody measured.
    """
    if "H200" not in device_name:
        return None
    return max(shape.flops(tokens) / _H200_FLOPS, 2 * shape.code_bytes / _H200_BYTES) * 1e3
