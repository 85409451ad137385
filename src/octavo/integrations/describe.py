"""``octavo.describe``: per group of layers, how weights are stored, in what scale layout, on which engine, and what
trains.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from octavo.integrations.compiled import compiled_layers
from octavo.integrations.graphs import GraphsState, graphs_state
from octavo.nn.experts import OctavoExperts
from octavo.nn.linear import Float8Linear


@dataclass(frozen=True)
class Row:
    """Modules of one kind that are stored alike: which layers, how many, where and how they compute."""

    module: str
    layers: str
    count: int
    storage: str
    engine: str
    numerics: str
    activations: str
    """In what they are kept for backward: ``bf16`` (as computed) or ``fp8`` in routed experts, ``-`` elsewhere."""
    gigabytes: float
    trains: int


@dataclass(frozen=True)
class Description:
    """What :func:`describe` found; ``str()`` of it is the table.

    ``compiled``: the decoder layers that run as compiled graphs while they train, as ``0-46``; empty for none.
    ``graphed``: those that replay CUDA graphs, and ``graphs`` what became of that.
    """

    rows: tuple[Row, ...]
    compiled: str = ""
    graphed: str = ""
    graphs: GraphsState | None = None

    def __str__(self) -> str:
        header = ("module", "layers", "modules", "storage", "engine", "numerics", "kept", "size", "trains")
        table = [header] + [
            (
                r.module,
                r.layers,
                str(r.count),
                r.storage,
                r.engine,
                r.numerics,
                r.activations,
                _size(r.gigabytes),
                f"{r.trains:,}" if r.trains else "-",
            )
            for r in self.rows
        ]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]
        if self.compiled:
            lines.append(f"layers {self.compiled} run as compiled graphs while they train (octavo.compile_layers)")
        if self.graphs is not None:
            lines.append(
                f"layers {self.graphed} replay CUDA graphs while they train (octavo.graph_layers): {self.graphs}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Key:
    module: str
    storage: str
    engine: str
    numerics: str
    activations: str


def describe(model: nn.Module) -> Description:
    """The storage, engine and trainable parameters of every module with weights of its own, layers alike in one row.

    ``gigabytes``: decimal, of the module's own parameters. ``trains``: trainable parameters in the module and the
    adapters around it.
    """
    layers: dict[_Key, list[int]] = defaultdict(list)
    counts: dict[_Key, int] = defaultdict(int)
    gigabytes: dict[_Key, float] = defaultdict(float)
    trains: dict[_Key, int] = defaultdict(int)
    seen: set[int] = set()
    dtype = _activations(model)
    for name, module in _weighted(model):
        plain = name.replace(".base_layer", "").replace("base_model.model.", "")
        key = _Key(_pattern(plain), *_facts(module, dtype))
        counts[key] += 1
        if layer := re.search(r"\.(\d+)\.", plain):
            layers[key].append(int(layer.group(1)))
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                gigabytes[key] += parameter.numel() * parameter.element_size() / 1e9
                trains[key] += parameter.numel() if parameter.requires_grad else 0
        for parameter in _adapters(model, name):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                trains[key] += parameter.numel()
    graphs = graphs_state(model)
    return Description(
        tuple(
            Row(
                key.module,
                _ranges(layers[key]),
                count,
                key.storage,
                key.engine,
                key.numerics,
                key.activations,
                gigabytes[key],
                trains[key],
            )
            for key, count in counts.items()
        ),
        _numbers(compiled_layers(model)),
        _numbers([] if graphs is None else graphs.layers),
        graphs,
    )


def _weighted(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules with parameters of their own that are the model's, not an adapter's."""
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)) and ".lora_" not in name:
            yield name, module


def _adapters(model: nn.Module, name: str) -> Iterable[nn.Parameter]:
    """Trainable parameters of the wrappers around a base layer."""
    wrapper = name
    while wrapper.endswith(".base_layer"):
        wrapper = wrapper.removesuffix(".base_layer")
        for parameter_name, parameter in model.get_submodule(wrapper).named_parameters():
            if parameter.requires_grad and not parameter_name.startswith("base_layer."):
                yield parameter


def _activations(model: nn.Module) -> torch.dtype | None:
    """The dtype that activations will have without autocast: that of the embeddings and norms."""
    frozen = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(frozen, None)


def _facts(module: nn.Module, dtype: torch.dtype | None) -> tuple[str, str, str, str]:
    if isinstance(module, OctavoExperts):
        chosen = module.settings.choose(module.layer(module.device, dtype))
        return module.storage_name(), str(chosen), module.settings.numerics, module.settings.activations
    if isinstance(module, Float8Linear):
        return f"FP8 {module.layout}", str(module.settings.choose(module.layer(dtype))), module.settings.numerics, "-"
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters(recurse=False)})
    return ", ".join(dtypes), "torch", "-", "-"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 1 else f"{gigabytes * 1e3:.2f} MB"


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _numbers(layers: Sequence[str]) -> str:
    """The numbers of the layers of these names, as :func:`_ranges` has them; empty for none."""
    return _ranges([int(name.rpartition(".")[2]) for name in layers]) if layers else ""


def _ranges(layers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"
