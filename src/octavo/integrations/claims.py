"""Who claims which tensor: a checkpoint's ledger held against a model class, before any byte is read.

Names are resolved with transformers' own renamings and converters, so what is said here is what the loader will do.
"""

import dis
import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from octavo.checkpoint.accounting import Ledger, QuantizedWeight
from octavo.checkpoint.headers import TensorEntry
from octavo.errors import CheckpointError
from octavo.formats.scheme import ScaleLayout
from octavo.integrations.experts import experts_layout, why_not_ours

INSPECT = "Nothing was loaded. Run `octavo inspect` on this folder to see every tensor and what claims it."


@dataclass(frozen=True)
class Float8Target:
    """A model parameter that FP8 tensors of the checkpoint fill.

    ``sources``: in stacking order, part by part: every expert's gate, then every expert's up.
    """

    name: str
    layout: ScaleLayout
    sources: tuple[QuantizedWeight, ...]

    @property
    def owner(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def static_input(self) -> bool:
        return self.sources[0].activation is not None


@dataclass(frozen=True)
class StackedTarget:
    """A parameter [E, parts·rows, columns] that matrices of one dtype fill, each expert's parts below one another.

    ``entries``: part by part, as in :class:`Float8Target`. ``dtype``: by safetensors' name.
    """

    name: str
    shape: tuple[int, ...]
    parts: int
    entries: tuple[TensorEntry, ...]

    @property
    def dtype(self) -> str:
        return self.entries[0].dtype

    def places(self, stack: Tensor) -> dict[str, Tensor]:
        """Where each key goes in ``stack``: contiguous views."""
        rows = self.shape[1] // self.parts
        return {
            entry.key: stack[index % self.shape[0]].narrow(0, index // self.shape[0] * rows, rows)
            for index, entry in enumerate(self.entries)
        }


@dataclass(frozen=True)
class Claims:
    """What becomes of every tensor: FP8 stacks and layers by owner module, and weights to dequantize at load.

    ``experts``: stacks by module, then by parameter. ``linears``: by module. ``dequantized``: embeddings, output
    heads, and layers whose weight the model's own code reads. ``stacked``: whatever is stacked as is, FP8 or not.
    ``wanted``: keys of all that fills something. ``scales``: every scale in the files, by its name among
    the model's modules and by its key on disk. ``renamed``: of the dequantized, key on disk to name among the model's
    modules.
    """

    experts: dict[str, dict[str, Float8Target]]
    linears: dict[str, Float8Target]
    dequantized: dict[str, Float8Target]
    scales: dict[str, TensorEntry]
    renamed: dict[str, str]
    stacked: tuple[StackedTarget, ...] = ()
    wanted: frozenset[str] = frozenset()


def claim(ledger: Ledger, model: PreTrainedModel) -> Claims:
    """Hold every key of ``ledger`` against ``model`` (on the meta device).

    Raises :class:`CheckpointError` for a key that nothing claims, a parameter that nothing fills, a wrong shape, a
    weight that the config declares FP8 and the file holds in another dtype, and FP8 weights that no octavo module can
    hold.
    """
    names = _Names(ledger, model)
    parameters: dict[str, Tensor] = model.state_dict()
    weights: dict[str, list[QuantizedWeight]] = defaultdict(list)
    plain: dict[str, list[TensorEntry]] = defaultdict(list)
    unknown: list[TensorEntry] = []
    by_key = {weight.weight.key: weight for weight in ledger.quantized.values()}
    for key in sorted((*by_key, *ledger.plain), key=_natural):
        entry = ledger.entries[key]
        target = names.target(key, parameters)
        if target is None:
            unknown.append(entry)
        elif key in by_key:
            weights[target].append(by_key[key])
        else:
            plain[target].append(entry)
    _refuse_unknown(ledger, model, unknown, names)
    _refuse_missing(ledger, model, names.filled((*weights, *plain)), parameters)
    _check_shapes(names, parameters, weights, plain)
    if ledger.scheme is not None:
        _check_stacked(names, parameters, weights, plain)
        _check_dtypes(parameters, plain)
        _check_declared(ledger, model, plain)
    claims = _sort_targets(names, model, parameters, weights, plain)
    return replace(claims, stacked=tuple(_stacked(names, parameters, weights, plain)), wanted=_wanted(weights, plain))


def _stacked(
    names: "_Names",
    parameters: dict[str, Tensor],
    weights: dict[str, list[QuantizedWeight]],
    plain: dict[str, list[TensorEntry]],
) -> Iterator[StackedTarget]:
    """The parameters that are their matrices one after another, whatever else their converters can do."""
    entries = {target: [weight.weight for weight in filled] for target, filled in weights.items()}
    for target, filled in (*entries.items(), *plain.items()):
        converter, shape = names.converter_of.get(target), tuple(parameters[target].shape)
        if converter is None or not _stacks_matrices(converter) or len(shape) != 3:
            continue
        parts = len(converter.source_patterns)
        whole = (shape[1] // parts, shape[2])
        if len(filled) == shape[0] * parts and {(entry.shape, entry.dtype) for entry in filled} == {
            (whole, filled[0].dtype)
        }:
            yield StackedTarget(target, shape, parts, names.by_part(filled))


def _stacks_matrices(converter: WeightConverter) -> bool:
    """Whether a converter stacks matrices along a new first dimension, joins stacks along the second, and no more."""
    first, *others = converter.operations
    if type(first) is not MergeModulelist or first.dim != 0 or getattr(converter, "force_cpu", False):
        return False
    return all(type(other) is Concatenate and other.dim == 1 for other in others) and len(others) == (
        len(converter.source_patterns) > 1
    )


def _wanted(weights: dict[str, list[QuantizedWeight]], plain: dict[str, list[TensorEntry]]) -> frozenset[str]:
    quantized = [weight for filled in weights.values() for weight in filled]
    entries = [entry for weight in quantized for entry in (weight.weight, weight.scale, weight.activation) if entry]
    return frozenset(entry.key for entry in (*entries, *(entry for filled in plain.values() for entry in filled)))


class _Names:
    """On-disk keys to model parameters, by transformers' own rules."""

    def __init__(self, ledger: Ledger, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model)
        self.ledger, self.prefix = ledger, model.base_model_prefix
        self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.converter_of: dict[str, WeightConverter] = {}
        self._part_of: dict[str, int] = {}
        self._by_pattern = {p: converter for converter in self.converters for p in converter.source_patterns}

    def target(self, key: str, parameters: dict[str, Tensor]) -> str | None:
        """The parameter that ``key`` fills (the first of them, for a converter with several), or ``None``."""
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, parameters)
        if name not in parameters and key in parameters:
            name, pattern = rename_source_key(key, [], [], self.prefix, parameters)
        if name not in parameters:
            return None
        if pattern is not None:
            converter = self.converter_of[name] = self._by_pattern[pattern]
            self._part_of[key] = converter.source_patterns.index(pattern)
        return str(name)

    def filled(self, targets: Iterable[str]) -> set[str]:
        """``targets`` and whatever else their converters fill: some split a tensor over several parameters."""
        filled = set(targets)
        for target, converter in self.converter_of.items():
            first, *others = converter.target_patterns
            filled |= {target.replace(first, other) for other in others}
        return filled

    def experts_of(self, key: str, model: PreTrainedModel) -> nn.Module | None:
        """The stacked-experts module of ``model`` of which ``key`` names one expert, if any."""
        prefix, separator, expert = self.plain(key).partition(".experts.")
        if not separator or not expert.partition(".")[0].isdigit():
            return None
        ending = f"{prefix.removeprefix(f'{self.prefix}.')}.experts"
        owners = [module for name, module in model.named_modules() if f".{name}".endswith(f".{ending}")]
        return owners[0] if len(owners) == 1 and experts_layout(owners[0]) is not None else None

    def plain(self, key: str) -> str:
        """``key`` by the model's names, as converters find it: neither stacked nor with the base model's prefix."""
        return str(rename_source_key(key, self.renamings, [])[0])

    def renamed(self, key: str, target: str) -> str:
        """``key``, a scale, by the model's names but not stacked; ``target``: the parameter that its weight fills.

        A loader adds or drops the base model's prefix as the target asks for it.
        """
        name, dot = self.plain(key), f"{self.prefix}."
        if target.startswith(dot) and not name.startswith(dot):
            return dot + name
        return name if target.startswith(dot) else name.removeprefix(dot)

    def by_part(self, entries: list[TensorEntry]) -> tuple[TensorEntry, ...]:
        """``entries`` (experts in order) part by part, as the converter concatenates them."""
        return tuple(sorted(entries, key=lambda entry: self._part_of.get(entry.key, 0)))

    def stacked(self, sources: list[QuantizedWeight]) -> tuple[QuantizedWeight, ...]:
        """``sources`` (experts in order) part by part, as the converter concatenates them."""
        return tuple(sorted(sources, key=lambda source: self._part_of.get(source.weight.key, 0)))


def _natural(key: str) -> list[Any]:
    """Order numbers in a name as numbers: expert 2 before expert 10, as the loader stacks them."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]


def _fail(entry: TensorEntry, text: str) -> NoReturn:
    raise CheckpointError(f"{entry.file.name}: {entry.key!r} {text} {INSPECT}")


def _refuse_unknown(ledger: Ledger, model: PreTrainedModel, unknown: list[TensorEntry], names: _Names) -> None:
    known = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    left = [entry for entry in unknown if not any(pattern.search(entry.key) for pattern in known)]
    # a frequency table that old checkpoints carry; transformers computes it
    left = [entry for entry in left if not entry.key.endswith("rotary_emb.inv_freq")]
    if left and ledger.scheme is not None:
        if (owner := names.experts_of(left[0].key, model)) is not None:
            reason = why_not_ours(owner, float8=True) or "transformers has no conversion that stacks its experts"
            _fail(left[0], f"is one expert of a {type(owner).__name__}, which octavo cannot hold in FP8: {reason}.")
        count = f"one of {len(left)} such tensors, " if len(left) > 1 else ""
        _fail(
            left[0],
            f"({count}{left[0].dtype} {list(left[0].shape)}) belongs to no parameter of {type(model).__name__}, and "
            f"neither the config nor the "
            "model class names it as unused. Check that config.json is this checkpoint's own.",
        )


def _refuse_missing(ledger: Ledger, model: PreTrainedModel, filled: set[str], parameters: dict[str, Tensor]) -> None:
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied = set(model.all_tied_weights_keys)
    missing = [
        name
        for name in parameters
        if name not in filled and name not in tied and not any(pattern.search(name) for pattern in optional)
    ]
    if missing and ledger.scheme is not None:
        files = f"{len(ledger.files)} file{'s' if len(ledger.files) > 1 else ''} in {ledger.folder.name}"
        raise CheckpointError(
            f"No tensor in the {files} fills {missing[0]!r}"
            + (f" and {len(missing) - 1} more parameters" if len(missing) > 1 else "")
            + f" of {type(model).__name__}; transformers would have initialised it at random. "
            f"Download the checkpoint again. {INSPECT}"
        )


def _check_shapes(
    names: _Names,
    parameters: dict[str, Tensor],
    weights: dict[str, list[QuantizedWeight]],
    plain: dict[str, list[TensorEntry]],
) -> None:
    entries = {target: [weight.weight for weight in filled] for target, filled in weights.items()}
    for target, filled in (*entries.items(), *plain.items()):
        shape = tuple(parameters[target].shape)
        converter = names.converter_of.get(target)
        if converter is None:
            for entry in filled:
                if entry.shape != shape:
                    _fail(entry, f"has shape {list(entry.shape)}, the model's {target!r} has {list(shape)}.")
        elif _stacks(converter):
            total = sum(_numel(entry.shape) for entry in filled)
            if total != _numel(shape):
                _fail(
                    filled[0],
                    f"and {len(filled) - 1} more are stacked into {target!r} of shape {list(shape)}: they hold "
                    f"{total} values, expected "
                    f"{_numel(shape)}.",
                )


def _check_stacked(
    names: _Names,
    parameters: dict[str, Tensor],
    weights: dict[str, list[QuantizedWeight]],
    plain: dict[str, list[TensorEntry]],
) -> None:
    """Every expert's matrix has the shape of its place in the stack: gate and up may not trade rows."""
    entries = {target: [weight.weight for weight in filled] for target, filled in weights.items()}
    for target, filled in (*entries.items(), *plain.items()):
        converter, shape = names.converter_of.get(target), tuple(parameters[target].shape)
        if converter is None or not _stacks(converter) or len(shape) != 3:
            continue
        parts = len(converter.source_patterns)
        expected = (shape[1] // parts, shape[2])
        for entry in filled:
            if len(entry.shape) == 2 and entry.shape != expected:
                _fail(entry, f"has shape {list(entry.shape)}, its place in {target!r} has {list(expected)}.")


def _check_dtypes(parameters: dict[str, Tensor], plain: dict[str, list[TensorEntry]]) -> None:
    """A floating-point parameter is filled from floating-point numbers: the loader would cast integers by value."""
    for target, entries in plain.items():
        for entry in entries:
            if parameters[target].is_floating_point() and entry.dtype not in ("BF16", "F16", "F32", "F64"):
                _fail(entry, f"is {entry.dtype}, expected BF16, F16, F32 or F64 for {target!r}.")


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _stacks(converter: WeightConverter) -> bool:
    """Whether a converter only stacks and concatenates, so that codes and scale grids may go through it."""
    return all(isinstance(operation, MergeModulelist | Concatenate) for operation in converter.operations)


def _check_declared(ledger: Ledger, model: PreTrainedModel, plain: dict[str, list[TensorEntry]]) -> None:
    """Refuse a linear layer that the config declares FP8 and the file holds in another dtype."""
    assert ledger.scheme is not None
    exempt = _kept_by_default(model)
    for target, entries in plain.items():
        owner, _, parameter = target.rpartition(".")
        module = model.get_submodule(owner)
        if parameter != "weight" or not isinstance(module, nn.Linear) or owner in exempt:
            continue
        for entry in entries:
            name = entry.key.removesuffix(".weight")
            if ledger.scheme.layout_of(name) is not None:
                _fail(
                    entry,
                    f"is {entry.dtype}, and the config declares it FP8 ({ledger.scheme.why(name)}). If it was left "
                    f"unquantized on "
                    "purpose, name it in the config's ignore list.",
                )


def _kept_by_default(model: PreTrainedModel) -> set[str]:
    """Modules that quantizers leave alone without naming them: the output head, whatever is tied, and linear layers
    that the model class wants in float32.
    """
    head = model.get_output_embeddings()
    kept = {name for name, module in model.named_modules() if head is not None and module is head}
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    wide = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept |= {name for name in linears if not should_convert_module(name, wide)}
    return kept | {name.rpartition(".")[0] for name in tied}


def float8_linears(model: PreTrainedModel) -> list[str]:
    """Linear layers that hold codes where the config declares them FP8: neither left alone nor dequantized at load."""
    kept = _kept_by_default(model)
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return [name for name in linears if name not in kept and not _is_read_around(model, name)]


def _is_read_around(model: PreTrainedModel, name: str) -> bool:
    """Whether the code of the module around the layer ``name`` reads ``self.<layer>.weight`` itself.

    ``x.to(self.weights_proj.weight.dtype)`` and a fused kernel that is handed ``self.out_proj.weight`` would take codes
    for the weight.
    """
    parent, _, child = name.rpartition(".")
    around: Any = type(model.get_submodule(parent))
    return child in _weights_read_by(around)


@cache
def _weights_read_by(cls: Any) -> frozenset[str]:
    """The attributes whose ``.weight`` the methods of ``cls`` read, off their bytecode."""
    read: set[str] = set()
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for method in vars(base).values():
            if inspect.isfunction(method):
                code = dis.get_instructions(inspect.unwrap(method))
                loads = [(step.opname, step.argval) for step in code if step.opname not in ("CACHE", "EXTENDED_ARG")]
                read |= {
                    child
                    for (before, child), (after, attribute) in pairwise(loads)
                    if before == after == "LOAD_ATTR" and attribute == "weight"
                }
    return frozenset(read)


def _sort_targets(
    names: _Names,
    model: PreTrainedModel,
    parameters: dict[str, Tensor],
    weights: dict[str, list[QuantizedWeight]],
    plain: dict[str, list[TensorEntry]],
) -> Claims:
    claims = Claims({}, {}, {}, {}, {})
    kept = _kept_by_default(model)
    for name, sources in weights.items():
        if name in plain:
            _fail(
                plain[name][0],
                f"is {plain[name][0].dtype} while {sources[0].weight.key!r} is FP8, and both are stacked into "
                f"{name!r}: experts of one layer are quantized "
                "all or none.",
            )
        layouts = {source.layout for source in sources}
        if len(layouts) > 1:
            _fail(
                sources[0].weight,
                f"shares {name!r} with weights of another scale layout: {', '.join(map(str, layouts))}.",
            )
        target = Float8Target(name, sources[0].layout, names.stacked(sources))
        for scale in (entry for source in sources for entry in (source.scale, source.activation) if entry is not None):
            claims.scales[names.renamed(scale.key, name)] = scale
            # before 5.21 names are already the file's when a scale is saved
            claims.scales.setdefault(scale.key, scale)
        converter = names.converter_of.get(name)
        if converter is not None and not _stacks(converter):
            _fail(
                sources[0].weight,
                f"is FP8, and {type(model).__name__} rearranges it while loading ({converter.operations}).",
            )
        if len({source.activation is None for source in sources}) > 1:
            _fail(sources[0].weight, f"has a static activation scale and others stacked into {name!r} have none.")
        owner = model.get_submodule(target.owner)
        if target.owner in kept or isinstance(owner, nn.Embedding) or _is_read_around(model, target.owner):
            claims.dequantized[name] = target
            entries = (sources[0].weight, sources[0].scale, sources[0].activation)
            claims.renamed.update({entry.key: names.plain(entry.key) for entry in entries if entry is not None})
        elif (layout := experts_layout(owner)) is not None and target.parameter in layout.names:
            if reason := why_not_ours(owner, float8=True):
                _fail(sources[0].weight, f"is FP8, and octavo cannot hold {type(owner).__name__}: {reason}.")
            claims.experts.setdefault(target.owner, {})[target.parameter] = target
        elif type(owner) is nn.Linear and len(sources) == 1:
            claims.linears[target.owner] = target
        else:
            _fail(
                sources[0].weight,
                f"is FP8 and fills {name!r} of a {type(owner).__name__}, which octavo has no FP8 storage for.",
            )
    for owner_name, stacks in claims.experts.items():
        layout = experts_layout(model.get_submodule(owner_name))
        assert layout is not None
        for name in layout.names:
            if name not in stacks:
                some = next(iter(stacks.values())).sources[0].weight
                _fail(
                    some,
                    f"is FP8 while {owner_name}.{name} is not: an experts layer is quantized in all its projections "
                    f"or in none.",
                )
    return claims
