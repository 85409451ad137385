"""The facts about a quantized checkpoint, apart from how each family of formats writes them down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["dynamic-token", "dynamic-group", "dynamic-tensor", "static-tensor", "none", "mixed"]


@dataclass(frozen=True)
class ScaleLayout:
    """Which codes of a ``[rows, cols]`` weight share a scale.

    ``channel``: one scale a row. ``tensor``: one for all. ``block``: one for each ``block = (b_n, b_k)`` tile, counted
    from the top left corner, the last ones cut off by the edge.
    """

    kind: Literal["channel", "tensor", "block"]
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.kind == "block") != (self.block is not None):
            raise ValueError(
                f"a block size belongs to kind 'block' and to no other, got {self.kind!r} and {self.block}"
            )
        if self.block is not None and min(self.block) < 1:
            raise ValueError(f"block sizes are positive, got {self.block}")

    def __str__(self) -> str:
        return f"block {self.block[0]}x{self.block[1]}" if self.block else self.kind

    def block_of(self, rows: int, cols: int) -> tuple[int, int]:
        """The block size on a ``[rows, cols]`` weight: ``(1, cols)``, ``(rows, cols)`` or the format's own."""
        if self.block is not None:
            return self.block
        return (1, cols) if self.kind == "channel" else (rows, cols)

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """How many scales a ``[rows, cols]`` weight has: ``(ceil(rows / b_n), ceil(cols / b_k))``."""
        b_n, b_k = self.block_of(rows, cols)
        return -(-rows // b_n), -(-cols // b_k)

    def shapes_on_disk(self, rows: int, cols: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that formats store this grid in, the usual one first."""
        if self.kind == "channel":
            return (rows, 1), (rows,)
        if self.kind == "tensor":
            return (), (1,), (1, 1)
        return (self.grid(rows, cols),)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a config says about one module: its scale layout (None: left unquantized), and in whose words."""

    layout: ScaleLayout | None
    why: str
    activation: Activation = "none"


Judge = Callable[[str], Verdict]


@dataclass(frozen=True)
class QuantScheme:
    """What a checkpoint's config says about its quantization: facts, and the verdict on any module name.

    ``method``: the config's ``quant_method``. ``raw``: its ``quantization_config``, untouched, to be saved again.
    ``scale_suffix``: the last part of a weight scale's key; the scale multiplies, whatever its name says.
    ``scale_aliases``: other last parts with the same meaning. ``activation_suffix``: that of static activation scales,
    None where the config has none. ``scale_format``: ``ue8m0`` scales are powers of two.
    ``activation``: how activations are quantized by a server of this checkpoint, ``mixed`` where that depends on the
    module (see ``activation_of``). ``ignored_suffixes``: last parts of keys that the config explains and that no weight
    needs, with the reason. ``judge``: module name to verdict, by the family's own rules of matching.
    """

    method: str
    raw: Mapping[str, Any]
    scale_suffix: str
    activation_suffix: str | None
    scale_format: Literal["float", "ue8m0"]
    activation: Activation
    judge: Judge = field(repr=False, compare=False)
    scale_aliases: tuple[str, ...] = ()
    ignored_suffixes: Mapping[str, str] = field(default_factory=dict)

    def layout_of(self, module: str) -> ScaleLayout | None:
        """The scale layout of a linear layer, by its name on disk without ``.weight``; None: left unquantized.

        A config speaks of linear layers. For a norm or an embedding the answer is what it would be for a linear layer
        of that name.
        """
        return self.judge(module).layout

    def activation_of(self, module: str) -> Activation:
        """How a server of this checkpoint quantizes what goes into ``module``."""
        return self.judge(module).activation

    def why(self, module: str) -> str:
        """The verdict on ``module`` in words: ``channel FP8 by group_0``, ``ignored: 're:.*lm_head'``."""
        return self.judge(module).why
