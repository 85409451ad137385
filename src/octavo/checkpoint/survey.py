"""A ledger summed up for a reader: what is stored how in which layers, and what it weighs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from octavo.checkpoint.accounting import Ledger
from octavo.checkpoint.headers import TensorEntry

# The words that models use, tried in order on the name below its layer. Experts first: their names contain "mlp".
_PARTS = (
    ("routed experts", re.compile(r"(^|\.)experts\.")),
    ("shared experts", re.compile(r"shared_expert|shared_mlp")),
    ("router", re.compile(r"(^|\.)(gate|router|wg)(\.|$)|e_score_correction_bias|expert_bias")),
    ("attention", re.compile(r"attn|attention|mixer|mamba")),
    ("dense MLP", re.compile(r"mlp|feed_forward|ffn|block_sparse_moe|moe")),
    ("embeddings", re.compile(r"embed|wte|wpe")),
    ("output head", re.compile(r"^(lm_head|output|score)\b")),
)
_LAYER = re.compile(r"^(?P<above>(?:.*?\.)?)(?:layers|blocks|h)\.(?P<number>\d+)\.(?P<below>.+)$")
# How a reader goes through a model; what is not named here comes last.
_ORDER = ("embeddings", "attention", "dense MLP", "shared experts", "routed experts", "router", "output head")
_TOWER = re.compile(r"vision|visual|audio|speech")


@dataclass(frozen=True)
class Group:
    """Matrices stored alike, in a run of layers that are equal in this.

    ``layers``: ``2-38``, or empty for what is in no layer. ``storage``: ``FP8 channel`` or a safetensors dtype.
    ``why``: the config's words. ``matrices`` and ``nbytes``: over all the layers, scales included.
    """

    layers: str
    part: str
    storage: str
    why: str
    matrices: int
    nbytes: int


@dataclass(frozen=True)
class Amount:
    """How many tensors of a kind there are, and their bytes."""

    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Survey:
    """``groups``: matrices, layer by layer. ``kinds``: every tensor once, by kind; they sum up to all of it."""

    groups: tuple[Group, ...]
    kinds: dict[str, Amount]

    @property
    def total(self) -> Amount:
        return Amount(sum(k.tensors for k in self.kinds.values()), sum(k.nbytes for k in self.kinds.values()))


@dataclass(slots=True)
class _Tally:
    """Matrices of one layer and part that are stored alike and for the same reason."""

    matrices: int = 0
    nbytes: int = 0
    words: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Place:
    part: str
    layer: int | None


def survey(ledger: Ledger) -> Survey:
    """Sums up a ledger; reads nothing."""
    tallies: dict[_Place, dict[tuple[str, bool], _Tally]] = {}
    for entry, storage, nbytes, words, by_rule in _matrices(ledger):
        tally = tallies.setdefault(_place(entry.key), {}).setdefault((storage, by_rule), _Tally())
        tally.matrices += 1
        tally.nbytes += nbytes
        tally.words[words] += 1
    return Survey(tuple(_collapse(tallies)), _kinds(ledger))


def _matrices(ledger: Ledger) -> Iterator[tuple[TensorEntry, str, int, str, bool]]:
    """Each matrix with its storage, its bytes with scales, the config's words, and whether a list of names said so."""
    for weight in ledger.quantized.values():
        nbytes = weight.weight.nbytes + weight.scale.nbytes + (weight.activation.nbytes if weight.activation else 0)
        why = ledger.scheme.why(weight.module) if ledger.scheme else ""
        yield weight.weight, f"FP8 {weight.layout}", nbytes, why, False
    for key, entry in ledger.plain.items():
        if len(entry.shape) < 2:
            continue
        module = key.removesuffix(".weight")
        if ledger.scheme is None:
            yield entry, entry.dtype, entry.nbytes, "", False
        elif ledger.scheme.layout_of(module) is None:
            yield entry, entry.dtype, entry.nbytes, ledger.scheme.why(module), True
        else:
            yield entry, entry.dtype, entry.nbytes, "stored so; on no list of the config", False


def _place(key: str) -> _Place:
    match = _LAYER.match(key)
    above, below = (match["above"], match["below"]) if match else ("", key)
    part = next((name for name, pattern in _PARTS if pattern.search(below)), "other")
    tower = _TOWER.search(above or key)
    return _Place(f"{tower[0]} {part}" if tower else part, int(match["number"]) if match else None)


def _collapse(tallies: dict[_Place, dict[tuple[str, bool], _Tally]]) -> Iterator[Group]:
    """One group for each run of equal consecutive layers, part by part."""
    parts = dict.fromkeys(place.part for place in tallies)
    for part in sorted(parts, key=lambda part: _ORDER.index(part) if part in _ORDER else len(_ORDER)):
        places = sorted((p for p in tallies if p.part == part), key=lambda p: -1 if p.layer is None else p.layer)
        layers = [(place.layer, tallies[place]) for place in places]
        for _, run in groupby(enumerate(layers), key=lambda item: _signature(item[0], *item[1])):
            held = [layer for _, layer in run]
            yield from _merge(part, [number for number, _ in held], [tally for _, tally in held])


def _signature(position: int, layer: int | None, tallies: dict[tuple[str, bool], _Tally]) -> object:
    run = None if layer is None else layer - position
    return run, frozenset((how, tally.matrices, tally.nbytes) for how, tally in tallies.items())


def _merge(part: str, numbers: list[int | None], layers: list[dict[tuple[str, bool], _Tally]]) -> Iterator[Group]:
    first, last = numbers[0], numbers[-1]
    label = "" if first is None else str(first) if first == last else f"{first}-{last}"
    for how in layers[0]:
        tallies = [layer[how] for layer in layers]
        words = sum((tally.words for tally in tallies), Counter[str]())
        why = next(iter(words))
        if len(words) > 1:
            why = f"{why} and {len(words) - 1} more" if how[1] else " / ".join(words)
        yield Group(label, part, how[0], why, sum(t.matrices for t in tallies), sum(t.nbytes for t in tallies))


def _kinds(ledger: Ledger) -> dict[str, Amount]:
    quantized = ledger.quantized.values()
    plain: dict[str, list[TensorEntry]] = {}
    for entry in ledger.plain.values():
        plain.setdefault(entry.dtype, []).append(entry)
    kinds = {
        "FP8 codes": _amount(weight.weight for weight in quantized),
        "scales": _amount(weight.scale for weight in quantized),
        "activation scales": _amount(weight.activation for weight in quantized if weight.activation is not None),
        **{dtype: _amount(plain[dtype]) for dtype in sorted(plain)},
        "ignored": _amount(ledger.entries[key] for key in ledger.ignored),
    }
    return {name: amount for name, amount in kinds.items() if amount.tensors}


def _amount(entries: Iterable[TensorEntry]) -> Amount:
    sizes = [entry.nbytes for entry in entries]
    return Amount(len(sizes), sum(sizes))
