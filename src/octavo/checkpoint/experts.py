"""Banks of experts on disk: ``….experts.{e}.{projection}.weight``, to be stacked, so all alike or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.checkpoint.headers import TensorEntry
from octavo.checkpoint.problems import Kind, Problems
from octavo.formats.facts import Judge

_EXPERT_WEIGHT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.([^.]+)\.weight")
# Projections that a model stores as one fused weight, so that their layouts have to agree.
_FUSED = (("gate_proj", "up_proj"), ("w1", "w3"))
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


@dataclass
class Bank:
    """The routed experts of one layer: ``prefix`` as in ``model.layers.3.mlp.experts``."""

    prefix: str
    weights: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)

    def module(self, expert: int, projection: str) -> str:
        return f"{self.prefix}.{expert}.{projection}"


def banks(entries: Iterable[TensorEntry]) -> list[Bank]:
    """The banks among the tensors of a checkpoint, in order of appearance."""
    found: dict[str, Bank] = {}
    for entry in entries:
        if match := _EXPERT_WEIGHT.fullmatch(entry.key):
            prefix, expert, projection = match.groups()
            bank = found.get(prefix) or found.setdefault(prefix, Bank(prefix))
            bank.weights.setdefault(int(expert), {})[projection] = entry
    return list(found.values())


def declared_counts(config: Mapping[str, Any]) -> set[int]:
    """The numbers of routed experts that a config names; empty where it names none."""
    text = config.get("text_config")
    places = (config, text) if isinstance(text, Mapping) else (config,)
    return {place[name] for place in places for name in _COUNTS if type(place.get(name)) is int}


def check(bank: Bank, judge: Judge, counts: set[int], problems: Problems) -> None:
    """Reports missing experts, and banks of which a part is quantized, or in several layouts."""
    if not _check_complete(bank, counts, problems):
        return
    flat = {bank.module(e, p): entry for e, ps in bank.weights.items() for p, entry in ps.items()}
    other = {module: entry for module, entry in flat.items() if entry.dtype != "F8_E4M3"}
    if not other:
        _check_alike(bank, judge, problems)
        return
    module, entry = next(iter(other.items()))
    if len(other) < len(flat):
        problems.add(
            Kind.PARTIAL,
            f"{bank.prefix}: {len(flat) - len(other)} of {len(flat)} expert weights are F8_E4M3 and the rest is not, "
            f"{entry.file.name} has {entry.key!r} as {entry.dtype} (config: {judge(module).why})",
        )
        return
    for module, entry in other.items():
        if judge(module).layout is not None:
            problems.add(
                Kind.DTYPE,
                f"{entry.file.name} has {entry.key!r} as {entry.dtype}, expected F8_E4M3 ({judge(module).why})",
            )


def _check_complete(bank: Bank, counts: set[int], problems: Problems) -> bool:
    numbers = bank.weights.keys()
    expected = max(numbers) + 1
    if counts and expected not in counts:
        expected = max(*counts, expected)
    absent = [e for e in range(expected) if e not in numbers]
    if absent:
        problems.add(
            Kind.EXPERTS,
            f"{bank.prefix} has {len(numbers)} experts, numbered to {max(numbers)}, expected {expected}; "
            f"expert {absent[0]} is in no file",
        )
        return False
    projections = set().union(*bank.weights.values())
    for expert, held in bank.weights.items():
        if len(held) < len(projections):
            missing = min(projections - held.keys())
            problems.add(
                Kind.EXPERTS, f"{bank.module(expert, missing)}.weight is in no file, the other experts have it"
            )
            return False
    return True


def _check_alike(bank: Bank, judge: Judge, problems: Problems) -> None:
    layouts: dict[str, object] = {}
    for projection, model in next(iter(bank.weights.values())).items():
        for expert, held in bank.weights.items():
            entry, module = held[projection], bank.module(expert, projection)
            layout = judge(module).layout
            if entry.shape != model.shape or layout != layouts.setdefault(projection, layout):
                problems.add(
                    Kind.PARTIAL,
                    f"{entry.file.name} has {entry.key!r} {list(entry.shape)} in layout {layout}, and {model.key!r} is "
                    f"{list(model.shape)} in layout {layouts[projection]}",
                )
                return
    for gate, up in _FUSED:
        if gate in layouts and up in layouts and layouts[gate] != layouts[up]:
            problems.add(
                Kind.PARTIAL,
                f"{bank.prefix}: {gate} has layout {layouts[gate]} and {up} has {layouts[up]}, which are fused",
            )
