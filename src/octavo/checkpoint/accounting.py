"""The ledger of a checkpoint: what every tensor of every file is, from the headers and the config alone.

This is level 1, which needs no model class. What only the class can tell, a linear layer that the config declares FP8
and the file has in bf16, say, is for the integration that has the class.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from octavo.checkpoint import experts, files
from octavo.checkpoint.headers import TensorEntry, read_header
from octavo.checkpoint.problems import Kind, Problems
from octavo.formats.facts import Judge, QuantScheme, ScaleLayout, Verdict
from octavo.formats.scheme import parse_scheme

_FP8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
# Last parts of keys that quantization tools write. Where the scheme does not claim one of them, nothing would read it.
_TRACES = frozenset(
    [
        *("weight_scale", "weight_scale_inv", "weight_scale_2", "qscale_weight", "weight_global_scale"),
        *("weight_zero_point", "weight_packed", "weight_shape", "weight_g_idx", "qweight", "qzeros"),
        *("input_scale", "input_scale_ub", "input_global_scale", "input_zero_point", "activation_scale"),
        *("output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"),
    ]
)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """An FP8 weight with all that belongs to it, by the module's name on disk (without ``.weight``)."""

    module: str
    weight: TensorEntry
    scale: TensorEntry
    activation: TensorEntry | None
    layout: ScaleLayout


@dataclass(frozen=True)
class Ledger:
    """Every tensor of a checkpoint under what it is.

    ``quantized``: by module. ``plain``: by key. ``ignored``: key to reason. Together with the scales of ``quantized``
    they are ``entries``, every key of every file, once.
    """

    folder: Path
    config: Mapping[str, Any]
    scheme: QuantScheme | None
    files: tuple[Path, ...]
    entries: dict[str, TensorEntry]
    quantized: dict[str, QuantizedWeight]
    plain: dict[str, TensorEntry]
    ignored: dict[str, str]


def open_ledger(source: Path | Sequence[Path], *, config: Mapping[str, Any] | None = None) -> Ledger:
    """Reads the headers of a checkpoint and accounts for every tensor.

    ``source``: the checkpoint's folder, or its safetensors files as a loader resolved them. ``config``: the content of
    ``config.json`` where it is at hand. Of an unquantized checkpoint only what plain transformers could not load is
    refused.

    Raises: CheckpointError naming file, tensor, what was found, what was expected and what to do.
    """
    with collector_paused():
        return _open(files.find(source, config))


@contextmanager
def collector_paused() -> Iterator[None]:
    """Holds Python's cyclic collector back while some 500 000 objects without cycles are made.

    It would walk them again and again: 0.6 of 1.3 s for the ledger of 75 000 tensors, 3 of 9 s for loading as many.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _open(found: files.Source) -> Ledger:
    scheme = parse_scheme(found.config)
    problems = Problems()
    entries: dict[str, TensorEntry] = {}
    for file in found.files:
        for key, entry in read_header(file).items():
            first = entries.setdefault(key, entry)
            if first is not entry:
                problems.add(Kind.DUPLICATE, f"{key!r} is in {first.file.name} and in {file.name}")
    if scheme is None:
        _refuse_hidden_fp8(found, entries)
        return Ledger(found.folder, found.config, None, found.files, entries, {}, dict(entries), {})
    _check_index(found, entries, problems)
    judge = cache(scheme.judge)
    quantized, plain, ignored = _Sorter(scheme, judge, entries, problems).sort()
    counts = experts.declared_counts(found.config)
    for bank in experts.banks(entries.values()):
        experts.check(bank, judge, counts, problems)
    problems.raise_first(str(found.folder))
    return Ledger(found.folder, found.config, scheme, found.files, entries, quantized, plain, ignored)


def _refuse_hidden_fp8(found: files.Source, entries: Mapping[str, TensorEntry]) -> None:
    problems = Problems()
    for entry in entries.values():
        if entry.dtype in _FP8:
            problems.add(
                Kind.UNEXPLAINED,
                f"{entry.file.name} has {entry.key!r} as {entry.dtype}, and {files.CONFIG} has no quantization_config",
            )
    problems.raise_first(str(found.folder))


def _check_index(found: files.Source, entries: Mapping[str, TensorEntry], problems: Problems) -> None:
    if found.weight_map is None:
        return
    for stray in found.strays:
        problems.add(Kind.INDEX, f"{stray.name} is in the folder, and {files.INDEX} lists no tensor of it")
    # One Path object for each file, so that 75 000 comparisons are of identities.
    shards = {file.relative_to(found.folder).as_posix(): file for file in found.files}
    for key, name in found.weight_map.items():
        entry = entries.get(key)
        if entry is None:
            problems.add(Kind.INDEX, f"{key!r} is listed in {name} and is in no file")
        elif entry.file is not shards[name]:
            problems.add(Kind.INDEX, f"{key!r} is listed in {name} and is in {entry.file.name}")
    for key, entry in entries.items():
        if key not in found.weight_map:
            problems.add(Kind.INDEX, f"{entry.file.name} has {key!r}, which {files.INDEX} does not list")


class _Sorter:
    """Puts each tensor of a quantized checkpoint under what it is."""

    def __init__(
        self, scheme: QuantScheme, judge: Judge, entries: Mapping[str, TensorEntry], problems: Problems
    ) -> None:
        self.scheme = scheme
        self.judge = judge
        self.entries = entries
        self.problems = problems
        self.plain: dict[str, TensorEntry] = {}
        self.ignored: dict[str, str] = {}
        self.scales: dict[str, TensorEntry] = {}
        self.activations: dict[str, TensorEntry] = {}
        self.weights: dict[str, TensorEntry] = {}

    def sort(self) -> tuple[dict[str, QuantizedWeight], dict[str, TensorEntry], dict[str, str]]:
        for key, entry in self.entries.items():
            self._place(key, entry)
        quantized = {}
        for module, weight in self.weights.items():
            if found := self._assemble(module, weight):
                quantized[module] = found
        self._report_orphans()
        return quantized, self.plain, self.ignored

    def _place(self, key: str, entry: TensorEntry) -> None:
        module, _, last = key.rpartition(".")
        if last == "weight" and entry.dtype in _FP8:
            self.weights[module] = entry
        elif last == self.scheme.scale_suffix:
            self._claim(self.scales, module, entry)
        elif last == self.scheme.activation_suffix:
            self.activations[module] = entry
        elif last in self.scheme.ignored_suffixes:
            self.ignored[key] = self.scheme.ignored_suffixes[last]
        elif last in self.scheme.scale_aliases and self._holds_codes(module):
            self._claim(self.scales, module, entry)
        elif entry.dtype in _FP8:
            expected = "expected two dimensions and a name that ends in '.weight'"
            self._report(Kind.STACKED, entry, f", of shape {list(entry.shape)}, {expected}")
        elif last in _TRACES:
            self.problems.add(
                Kind.UNKNOWN,
                f"{entry.file.name} has {key!r}, which method {self.scheme.method!r} with this config does not use",
            )
        else:
            self.plain[key] = entry

    def _holds_codes(self, module: str) -> bool:
        # A name as common as "scale" is a scale of ours only beside codes.
        weight = self.entries.get(f"{module}.weight")
        return weight is not None and weight.dtype in _FP8

    def _claim(self, claims: dict[str, TensorEntry], module: str, entry: TensorEntry) -> None:
        first = claims.setdefault(module, entry)
        if first is not entry:
            self.problems.add(Kind.ORPHAN, f"{module!r} has two scales, {first.key!r} and {entry.key!r}")

    def _assemble(self, module: str, weight: TensorEntry) -> QuantizedWeight | None:
        """The weight with its scale, or None after reporting what is wrong with it."""
        verdict = self.judge(module)
        scale = self.scales.pop(module, None)
        activation = self.activations.pop(module, None)
        if weight.dtype != "F8_E4M3":
            self._report(Kind.DTYPE, weight, ", expected F8_E4M3")
        elif verdict.layout is None:
            self._report(Kind.UNDECLARED, weight, f", expected an unquantized weight ({verdict.why})")
        elif len(weight.shape) != 2:
            self._report(Kind.STACKED, weight, f", of shape {list(weight.shape)}, expected two dimensions")
        elif scale is None:
            self._report(Kind.MISSING_SCALE, weight, f", expected '{module}.{self.scheme.scale_suffix}' beside it")
        elif self._fits(weight, scale, verdict) and self._activation_fits(module, verdict, activation):
            return QuantizedWeight(module, weight, scale, activation, verdict.layout)
        return None

    def _report(self, kind: Kind, entry: TensorEntry, rest: str) -> None:
        self.problems.add(kind, f"{entry.file.name} has {entry.key!r} as {entry.dtype}{rest}")

    def _fits(self, weight: TensorEntry, scale: TensorEntry, verdict: Verdict) -> bool:
        assert verdict.layout is not None
        rows, cols = weight.shape
        shapes = verdict.layout.shapes_on_disk(rows, cols)
        if scale.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            self.problems.add(
                Kind.SHAPE,
                f"{scale.file.name} has {scale.key!r} {list(scale.shape)}, expected {expected} for a weight "
                f"{list(weight.shape)} ({verdict.why})",
            )
            return False
        return self._is_scale(scale)

    def _activation_fits(self, module: str, verdict: Verdict, scale: TensorEntry | None) -> bool:
        if scale is None:
            if verdict.activation == "static-tensor":
                self.problems.add(
                    Kind.MISSING_ACTIVATION,
                    f"{module!r} has static activations ({verdict.why}), expected "
                    f"'{module}.{self.scheme.activation_suffix}' beside its weight",
                )
            return verdict.activation != "static-tensor"
        if scale.shape not in ((), (1,), (1, 1)):
            self.problems.add(
                Kind.SHAPE, f"{scale.file.name} has {scale.key!r} {list(scale.shape)}, expected one value: [] or [1]"
            )
            return False
        return self._is_scale(scale)

    def _is_scale(self, scale: TensorEntry) -> bool:
        allowed = (*_SCALES, "U8") if self.scheme.scale_format == "ue8m0" else _SCALES
        if scale.dtype not in allowed:
            self._report(Kind.SCALE_DTYPE, scale, f", expected {' or '.join(allowed)}")
        return scale.dtype in allowed

    def _report_orphans(self) -> None:
        for module, scale in (*self.scales.items(), *self.activations.items()):
            weight = self.entries.get(f"{module}.weight")
            if weight is None:
                self._report(Kind.ORPHAN, scale, f", and '{module}.weight' is in no file")
            else:
                self._report(Kind.DTYPE, weight, " with a scale, expected F8_E4M3")
