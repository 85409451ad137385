"""``quant_method: compressed-tensors`` with 8-bit float weights: vLLM's llm-compressor and many published FP8 models.

https://github.com/vllm-project/compressed-tensors. Groups say how, ``targets`` and ``ignore`` say which modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import CheckpointError
from octavo.formats import fields
from octavo.formats.facts import Activation, QuantScheme, ScaleLayout, Verdict
from octavo.formats.matching import NameList

# Both keep e4m3 codes under ``weight`` and multipliers under ``weight_scale``.
_FORMATS = ("float-quantized", "naive-quantized")
_KV_CACHE = "scale of the key-value cache (kv_cache_scheme)"
_OUTPUT = "scale of quantized outputs (output_activations)"


def declares_fp8(raw: Mapping[str, Any]) -> bool:
    """Whether any group has 8-bit float weights."""
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping):
        return False
    weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
    return any(isinstance(w, Mapping) and _kind(w) == ("float", 8) for w in weights)


@dataclass(frozen=True)
class _Group:
    """One group of the config. Without a layout it quantizes no weight."""

    name: str
    layout: ScaleLayout | None
    activation: Activation
    targets: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        if self.layout is None:
            return Verdict(None, f"weights left unquantized by {self.name}", self.activation)
        return Verdict(self.layout, f"{self.layout} FP8 by {self.name}", self.activation)


class _Judge:
    """Ignored, else the group of the whole name, of the first pattern in alphabetical order, of class ``Linear``.

    That is the order in which compressed-tensors itself prefers targets; of two groups with one target the last counts.
    """

    def __init__(self, groups: list[_Group], ignore: NameList) -> None:
        self._ignore = ignore
        owners = {target: group for group in groups for target in group.targets}
        self._verdicts = {target: group.verdict for target, group in owners.items()}
        self._names = NameList(sorted(target for target in owners if target != "Linear"), "targets")

    def __call__(self, module: str) -> Verdict:
        if entry := self._ignore.entry_for(module):
            return Verdict(None, f"ignored: {entry!r}")
        if target := self._names.entry_for(module):
            return self._verdicts[target]
        return self._verdicts.get("Linear", _UNTARGETED)


_UNTARGETED = Verdict(None, "no group of the config targets it")


def read(raw: Mapping[str, Any]) -> QuantScheme:
    """The scheme of a ``quantization_config`` with method ``compressed-tensors``. Raises: CheckpointError."""
    if raw.get("transform_config"):
        raise CheckpointError("compressed-tensors with a transform_config (rotated weights) is not read by octavo.")
    _refuse_sparsity(raw.get("sparsity_config"))
    groups = [
        _group(name, group, raw) for name, group in fields.mapping(raw.get("config_groups"), "config_groups").items()
    ]
    activations = {group.activation for group in groups if group.layout is not None}
    if not activations:
        raise CheckpointError("compressed-tensors: no group of config_groups has weights of type float with 8 bits.")
    activation: Activation = activations.pop() if len(activations) == 1 else "mixed"
    ignored: dict[str, str] = {}
    if any(group.get("output_activations") for group in raw["config_groups"].values()):
        ignored["output_scale"] = _OUTPUT
    if raw.get("kv_cache_scheme") is not None:
        ignored |= dict.fromkeys(("k_scale", "v_scale", "q_scale", "output_scale"), _KV_CACHE)
    static = any(group.activation == "static-tensor" for group in groups)
    return QuantScheme(
        method="compressed-tensors",
        raw=raw,
        scale_suffix="weight_scale",
        activation_suffix="input_scale" if static else None,
        scale_format="float",
        activation=activation,
        judge=_Judge(groups, NameList(fields.strings(raw.get("ignore"), "ignore"), "ignore")),
        ignored_suffixes=ignored,
    )


def _group(name: str, found: object, raw: Mapping[str, Any]) -> _Group:
    where = f"config_groups[{name!r}]"
    group = fields.mapping(found, where)
    targets = tuple(fields.strings(group.get("targets"), f"{where}.targets"))
    for target in targets:
        # A class name; module names and patterns start otherwise. Only the class of every linear layer can be told
        # from names on disk.
        if target != "Linear" and target[:1].isupper():
            raise CheckpointError(
                f"{where} targets the class {target!r}: octavo reads groups for 'Linear', for names and for "
                "'re:' patterns."
            )
    activation = _activation(where, group.get("input_activations"))
    if group.get("weights") is None:
        return _Group(name, None, activation, targets)
    weights = fields.mapping(group["weights"], f"{where}.weights")
    return _Group(name, _layout(where, weights, group.get("format") or raw.get("format")), activation, targets)


def _layout(where: str, weights: Mapping[str, Any], storage: object) -> ScaleLayout:
    kind, bits = _kind(weights)
    if (kind, bits) != ("float", 8):
        raise CheckpointError(
            f"{where} has weights of type {kind!r} with num_bits {bits} (format {storage!r}): octavo reads type "
            "'float' with num_bits 8."
        )
    if storage not in _FORMATS:
        raise CheckpointError(
            f"{where} is stored in format {storage!r}: octavo reads {' and '.join(map(repr, _FORMATS))}."
        )
    if not weights.get("symmetric", True):
        raise CheckpointError(f"{where} has asymmetric weights (zero points): octavo reads symmetric ones.")
    strategy = _strategy(weights)
    block = fields.block(weights.get("block_structure"), f"{where}.weights.block_structure")
    if strategy == "block" and block is not None:
        return ScaleLayout("block", block)
    if strategy == "channel":
        return ScaleLayout("channel")
    if strategy == "tensor":
        return ScaleLayout("tensor")
    raise CheckpointError(
        f"{where} has weights of strategy {strategy!r} (group_size {weights.get('group_size')}, block_structure "
        f"{weights.get('block_structure')}): octavo reads 'channel', 'tensor', and 'block' with its block_structure."
    )


def _activation(where: str, found: object) -> Activation:
    if found is None:
        return "none"
    settings = fields.mapping(found, f"{where}.input_activations")
    strategy, kind, bits = _strategy(settings), *_kind(settings)
    dynamic = settings.get("dynamic", False)
    if (kind, bits) != ("float", 8) or not settings.get("symmetric", True):
        raise CheckpointError(
            f"{where} has input_activations of type {kind!r} with num_bits {bits}, symmetric "
            f"{settings.get('symmetric', True)}: octavo reads symmetric 8-bit float ones."
        )
    if dynamic is True and strategy == "token":
        return "dynamic-token"
    if dynamic is True and strategy == "group":
        return "dynamic-group"
    if strategy == "tensor":
        return "dynamic-tensor" if dynamic is True else "static-tensor"
    raise CheckpointError(
        f"{where} has input_activations of strategy {strategy!r} with dynamic {dynamic!r}: octavo reads dynamic "
        "'token', 'group' and 'tensor', and static 'tensor'."
    )


def _kind(settings: Mapping[str, Any]) -> tuple[str, object]:
    """Type and bits, with the defaults of the format."""
    return str(settings.get("type", "int")).lower(), settings.get("num_bits", 8)


def _strategy(settings: Mapping[str, Any]) -> str:
    """The strategy; where it is left out the format tells it from the group size."""
    if settings.get("strategy") is not None:
        return str(settings["strategy"]).lower()
    size = settings.get("group_size")
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _refuse_sparsity(found: object) -> None:
    if not found:
        return
    storage = fields.mapping(found, "sparsity_config").get("format", "dense")
    if storage != "dense":
        raise CheckpointError(f"compressed-tensors with sparsity_config of format {storage!r}: octavo reads 'dense'.")
