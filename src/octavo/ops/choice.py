"""Which engine computes a layer: by name where it can, by a rule from measurements for ``auto``.

The rule is data, ``choice.json``: per architecture, kind of layer, numerics and scale layout, the engine by rows per
expert, with where the figures come from. What an engine takes is checked here from facts about the layer; nothing is
found out by running it, and nothing asks the device for a value.
"""

import json
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, Literal

import torch
from torch import Tensor

from octavo.errors import EngineError
from octavo.ops.capability import architecture_of, triton_missing
from octavo.ops.engines import Engine, ProductEngine
from octavo.ops.reference import Numerics
from octavo.ops.weights import WeightSpec

NUMERICS: tuple[Numerics, ...] = ("exact", "fp8_grad", "fp8")
ENGINES: tuple[str, ...] = ("reference", "dequant", "fused", "scaled")
# what comes next where the rule's engine cannot run: the first runs everywhere but rounds nothing to FP8
_FALLBACKS = ("dequant", "reference")
_ONLY_EXACT = "it multiplies in the dtype of the activations"
_COMPUTES: dict[str, tuple[tuple[Numerics, ...], str]] = {
    "reference": (NUMERICS, ""),
    "dequant": (("exact",), _ONLY_EXACT),
    "fused": (("exact",), _ONLY_EXACT),
    "scaled": (("fp8_grad", "fp8"), "its products round their operands to FP8"),
}
_UNLIMITED = 1 << 62

LayoutName = Literal["block", "channel", "tensor", "none"]
Weights = tuple[tuple[WeightSpec, Tensor], ...]
_FINEST: dict[LayoutName, int] = {"block": 0, "channel": 1, "tensor": 2, "none": 3}


@dataclass(frozen=True)
class Layer:
    """What a choice depends on.

    ``dtype``: of the activations; ``None`` where it is not known yet. ``block``: of the scales, ``None`` for weights
    that are not quantized; ``plain``: the dtype of these. ``widths``: in and out features of every weight, of one part
    each.
    """

    kind: Literal["experts", "linear"] = "experts"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    layout: LayoutName = "channel"
    block: tuple[int, int] | None = (1, 1)
    widths: tuple[int, ...] = ()
    bias: bool = False
    plain: torch.dtype | None = None


def experts_layer(device: torch.device, dtype: torch.dtype | None, weights: Weights, *, bias: bool) -> Layer:
    """The facts about an expert MLP. ``weights``: the spec and the stored tensor [E, N, K] of each projection."""
    specs = [(spec, *_one_part(spec, weight.shape)) for spec, weight in weights]
    widths = tuple(width for _, rows, columns in specs for width in (rows, columns))
    # the finer grid of the two decides
    layout, block = min(((_layout(*facts), _block(facts[0])) for facts in specs), key=lambda found: _FINEST[found[0]])
    plain = next((weight.dtype for spec, weight in weights if not spec.float8), None)
    return Layer("experts", device, dtype, layout, block, widths, bias, plain)


def linear_layer(device: torch.device, dtype: torch.dtype | None, spec: WeightSpec, shape: torch.Size) -> Layer:
    """The facts about a linear layer with FP8 weights [N, K]."""
    rows, columns = shape
    return Layer("linear", device, dtype, _layout(spec, rows, columns), spec.block, (rows, columns))


def _one_part(spec: WeightSpec, shape: torch.Size) -> tuple[int, int]:
    _, rows, columns = (shape[0], shape[2], shape[1]) if spec.transposed else shape
    return rows // spec.parts, columns


def _layout(spec: WeightSpec, rows: int, columns: int) -> LayoutName:
    if not spec.float8:
        return "none"
    if spec.block[1] < columns:
        return "block"
    return "channel" if spec.block[0] == 1 else "tensor"


def _block(spec: WeightSpec) -> tuple[int, int] | None:
    return spec.block if spec.float8 else None


@dataclass(frozen=True)
class Choice:
    """The engine by rows per expert, and what was passed over.

    ``steps``: (most rows per expert, engine), ascending. ``passed_over``: (engine, why it cannot run this layer).
    """

    steps: tuple[tuple[int, Engine], ...]
    passed_over: tuple[tuple[str, str], ...] = ()

    def at(self, rows_per_expert: float) -> Engine:
        """The engine for this many rows per expert."""
        for most, engine in self.steps:
            if rows_per_expert <= most:
                return engine
        return self.steps[-1][1]

    @property
    def largest(self) -> Engine:
        """The engine for many rows."""
        return self.steps[-1][1]

    def __str__(self) -> str:
        names = [engine.name if most == _UNLIMITED else f"{engine.name} to {most} rows" for most, engine in self.steps]
        text = ", then ".join(names)
        return text + "".join(f"; not {name}: {why}" for name, why in self.passed_over)


@dataclass(frozen=True)
class Request:
    """An engine asked for by name, to be chosen when the tensors are there."""

    name: str
    numerics: str


def check(name: str, numerics: str) -> None:
    """Raise :class:`EngineError` unless ``name`` is auto or an engine that computes ``numerics`` somewhere."""
    if numerics not in NUMERICS:
        raise EngineError(f"numerics {numerics!r} does not exist; choose one of {', '.join(NUMERICS)}.")
    if name == "auto":
        return
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} does not exist; choose auto or one of {', '.join(ENGINES)}.")
    computes, why = _COMPUTES[name]
    if numerics not in computes:
        usable = ", ".join(engine for engine in ENGINES if numerics in _COMPUTES[engine][0])
        raise EngineError(f"engine {name!r} cannot compute numerics {numerics!r}: {why}. Usable: {usable}.")


def computes(name: str, numerics: str) -> bool:
    """Whether engine ``name`` computes ``numerics`` on any layer."""
    return numerics in _COMPUTES[name][0]


@lru_cache(maxsize=512)
def choose(name: str, numerics: str, layer: Layer) -> Choice:
    """The engines called ``name`` for ``numerics`` on ``layer``; ``auto`` takes what the rule says and can run.

    A name that speaks of FP8 codes, ``fused`` or ``scaled``, is taken as auto where the layer is not quantized: a
    mixed checkpoint has both kinds. Raises :class:`EngineError` when a named engine does not exist, does not compute
    that, or cannot run the layer.
    """
    check(name, numerics)
    mode = next(mode for mode in NUMERICS if mode == numerics)
    if layer.block is None and name in ("fused", "scaled"):
        name = "auto"
    if name != "auto":
        if why := why_not(name, layer):
            raise EngineError(
                f"engine {name!r} cannot run this layer: {why}. Choose engine 'auto', which takes one that can."
            )
        return Choice(((_UNLIMITED, _build(name, mode, layer)),), _without_kernels(name, layer))
    if layer.block is None:
        mode = "exact"
    steps: list[tuple[int, Engine]] = []
    passed: dict[str, str] = {}
    for most, wanted in _rule(layer, mode)["steps"]:
        taken = None
        for candidate in (wanted, *_FALLBACKS):
            if mode not in _COMPUTES[candidate][0]:
                continue
            why = why_not(candidate, layer, tested=True)
            if why is None:
                taken = candidate
                break
            passed[candidate] = why
        assert taken is not None, "reference runs everywhere"
        passed |= dict(_without_kernels(taken, layer))
        if steps and steps[-1][1].name == taken:
            steps.pop()
        steps.append((_UNLIMITED if most is None else most, _build(taken, mode, layer)))
    return Choice(tuple(steps), tuple(passed.items()))


def select(name: str, numerics: str, layer: Layer | None = None, rows_per_expert: float = _UNLIMITED) -> Engine:
    """The one engine of :func:`choose` for this many rows per expert; a layer on the CPU where none is given."""
    return choose(name, numerics, layer or Layer()).at(rows_per_expert)


def why_not(name: str, layer: Layer, *, tested: bool = False) -> str | None:
    """Why engine ``name`` cannot run ``layer``, or ``None``. ``tested``: what was never run there counts as cannot."""
    return _kernels_why_not(name, layer, tested=tested) if name in ("fused", "scaled") else None


def _kernels_why_not(name: str, layer: Layer, *, tested: bool) -> str | None:
    """Why octavo's kernels cannot compute the layer as ``name`` does."""
    ability = architecture_of(layer.device).kernels
    if ability.runs == "no" or (tested and ability.runs == "untested"):
        return ability.why
    if reason := triton_missing():
        return reason
    if layer.dtype not in (torch.bfloat16, None):
        return f"its kernels take bfloat16 activations, not {layer.dtype}"
    if layer.block is None and name in ("fused", "scaled"):
        return "it reads FP8 codes, and this weight is not quantized"
    if layer.plain not in (torch.bfloat16, None):
        return f"its kernels take unquantized weights in bfloat16, and these are {layer.plain}"
    odd = [width for width in layer.widths if width % 16]
    if odd:
        return f"its kernels need widths that are multiples of 16, and this layer has {odd[0]}"
    if layer.block is None or layer.layout != "block":
        return None
    if layer.kind == "experts" and name != "dequant":
        if layer.block != (128, 128):
            return f"its kernels take blocks of 128x128, and these are {layer.block[0]}x{layer.block[1]}"
        cut = [width for width in layer.widths if width % 128]
        if name == "scaled" and cut:
            return f"it multiplies whole blocks, and {cut[0]} is not a multiple of 128"
    if layer.kind == "linear" and name == "scaled":
        odd = [size for size in layer.block if size < 16 or size & (size - 1)]
        if odd:
            return f"it rounds rows in blocks of a power of two of at least 16, and these have {odd[0]}"
    return None


def _without_kernels(name: str, layer: Layer) -> tuple[tuple[str, str], ...]:
    """The remark that ``dequant`` runs on its torch code where a GPU would have had kernels for it."""
    if name != "dequant" or layer.device.type != "cuda":
        return ()
    # where there are no kernels, the reason is one of FP8 codes
    if layer.block is None and architecture_of(layer.device).kernels.runs != "yes":
        return ()
    why = _kernels_why_not(name, layer, tested=True)
    return (("kernels", why),) if why else ()


def _build(name: str, numerics: Numerics, layer: Layer) -> Engine:
    if name != "reference" and _kernels_why_not(name, layer, tested=name == "dequant") is None:
        if layer.kind == "linear":
            from octavo.ops.matrix import MatrixEngine

            straight = {"fused": _UNLIMITED, "dequant": 0}.get(name, _few_rows(layer))
            scaled_mm = architecture_of(layer.device).scaled_mm.runs == "yes"
            hopper = _hopper_why_not(layer) is None
            return MatrixEngine(name, numerics, wide=False, few=straight, scaled_mm=scaled_mm, hopper=hopper)
        if _hopper_why_not(layer) is None:
            from octavo.ops.hopper.engine import HopperEngine

            return HopperEngine(name, numerics, wide=False)
        from octavo.ops.fused import KernelEngine

        return KernelEngine(name, numerics, wide=False)
    return ProductEngine(name, numerics, wide=name == "reference")


def _hopper_why_not(layer: Layer) -> str | None:
    """Why the products written for Hopper do not take the layer (Triton's do then), or ``None``."""
    from octavo.ops.hopper.compiler import missing

    if layer.device.type != "cuda" or architecture_of(layer.device).name != "sm90":
        return "they are built for Hopper"
    if layer.block is None:
        return "they read FP8 codes, and this weight is not quantized"
    if layer.bias:
        return "they add no bias"
    if reason := missing():
        return reason
    if odd := [width for width in layer.widths if width % 32 or width >= 2**16]:
        return f"they need widths that are multiples of 32 below 65536, and this layer has {odd[0]}"
    if layer.layout == "block" and layer.block is not None and any(size % 128 for size in layer.block):
        return f"they take scale blocks of multiples of 128, and these are {layer.block[0]}x{layer.block[1]}"
    return None


def _few_rows(layer: Layer) -> int:
    """Up to how many rows the rule reads codes straight into an exact product."""
    return max((most for most, engine in _rule(layer, "exact")["steps"] if engine == "fused"), default=0) or 0


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files("octavo.ops").joinpath("choice.json").read_text(encoding="utf-8"))
    return data


def rules() -> list[dict[str, Any]]:
    """The rows of ``choice.json``, first match first."""
    rows: list[dict[str, Any]] = _data()["rules"]
    return rows


def _rule(layer: Layer, numerics: Numerics) -> dict[str, Any]:
    facts = {
        "architecture": architecture_of(layer.device).name,
        "kind": layer.kind,
        "numerics": numerics,
        "layout": layer.layout,
    }
    return next(
        rule for rule in rules() if all(value in rule[key] or "any" in rule[key] for key, value in facts.items())
    )


@cache
def decode_limit(device: torch.device) -> float:
    """Up to how many rows per expert a forward without gradient reads weights row by row; 0 where it never does."""
    entry = _data()["decode"].get(architecture_of(device).name)
    return float(entry["pairs_per_expert"]) if entry else 0.0
