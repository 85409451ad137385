"""What a LoRA configuration names, and what peft makes of it: told apart before training, in words.

peft rewrites targets of MoE models on its own (``gate_proj`` becomes the stacked experts, ``all-linear`` takes the
router) and says nothing.
"""

import copy
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from octavo.integrations.lora_config import skeleton_of
from octavo.integrations.targets import GROUPS, Group, Weight, bare_name, find_weights, group_of


@dataclass(frozen=True)
class TrainableRow:
    """Trainable tensors of one kind.

    ``pattern``: the adapted weights, layers as ``*``. ``rank``: of one expert; None for what trains in full.
    """

    group: Group
    pattern: str
    tensors: int
    parameters: int
    rank: int | None


def trainable_parameters(model: nn.Module) -> list[TrainableRow]:
    """What requires a gradient in ``model``, an adapted or a bare one, by group, kind of weight and rank."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    factors: dict[int, tuple[str, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            owner = f"{bare_name(name)}.{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}"
            for part in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
                for adapter in part:
                    held = part[adapter].parameters() if isinstance(part[adapter], nn.Module) else [part[adapter]]
                    factors |= {id(parameter): (owner, layer.r[adapter]) for parameter in held}
    weights = find_weights(model)
    found: dict[tuple[Group, str, int | None], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner, rank = factors.get(id(parameter), (bare_name(name), None))
            found[group_of(owner, weights), _pattern(owner), rank].append(parameter)
    rows = [
        TrainableRow(group, pattern, len(held), sum(parameter.numel() for parameter in held), rank)
        for (group, pattern, rank), held in found.items()
    ]
    return sorted(rows, key=lambda row: (GROUPS.index(row.group), row.pattern, row.rank or 0))


@dataclass(frozen=True)
class Rehearsal:
    """Weights that a configuration names, and those that peft adapts for it, by name."""

    named: frozenset[str]
    adapted: frozenset[str]


def rehearse(model: PreTrainedModel, config: Any) -> Rehearsal:
    """Let peft adapt an empty model of the class of ``model`` with a copy of ``config``; neither is touched."""
    from peft import LoraModel

    twin, config = skeleton_of(model), copy.deepcopy(config)
    weights = find_weights(twin)
    named = {weight.name for weight in weights.values() if _is_named(weight, config)}
    with warnings.catch_warnings():
        # the real injection says the same again
        warnings.simplefilter("ignore")
        tuner = LoraModel(twin, config, "default", low_cpu_mem_usage=True)
    adapted = {f"{name}.weight" for name in tuner.targeted_module_names} | set(tuner.targeted_parameter_names)
    return Rehearsal(frozenset(named), frozenset(adapted))


def check_targets(model: PreTrainedModel, config: Any) -> list[str]:
    """What peft will drop from ``config`` and add to it on ``model``, a sentence each; empty when it takes it as it is.

    ``config``: a user's own ``LoraConfig``, before peft has seen it (peft rewrites it in place). ``target_modules``
    are read as peft documents them: names by equality or ending, a string as a regular expression, ``all-linear`` as
    every linear layer but the head.
    """
    rehearsal = rehearse(model, config)
    weights = find_weights(model)
    lines = []
    for names, said, way_out in (
        (rehearsal.named - rehearsal.adapted, "leaves out", "octavo.lora_config reaches them, by target_parameters"),
        (rehearsal.adapted - rehearsal.named, "adapts on its own", "name what you want, or use octavo.lora_config"),
    ):
        for group in GROUPS:
            members = [name for name in names if group_of(name, weights) == group]
            if members:
                lines.append(f"peft {said} {group}: {_patterns(members)} ({len(members)} weights); {way_out}.")
    return lines


def _is_named(weight: Weight, config: Any) -> bool:
    """Whether ``config`` names this weight, by the rules that peft documents."""
    if weight.name in (parameters := config.target_parameters or ()) or weight.name.endswith(
        tuple(f".{p}" for p in parameters)
    ):
        return True
    if not weight.is_linear or _matches(weight.module, config.exclude_modules or ()):
        return False
    if config.target_modules == "all-linear":
        return weight.group != "embeddings"
    return _matches(weight.module, config.target_modules or ())


def _matches(name: str, targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _patterns(names: Iterable[str]) -> str:
    kinds = sorted({_pattern(name).rpartition(".*.")[2].removesuffix(".weight") for name in names})
    return ", ".join(kinds)
