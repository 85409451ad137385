"""``octavo inspect CHECKPOINT``: format, storage layer by layer, sizes, and the accounting. Reads headers only."""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from octavo.checkpoint.accounting import Ledger, open_ledger
from octavo.checkpoint.survey import Survey, survey
from octavo.cli.locate import locate


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder, or the id of a model in the local hub cache.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id; its main branch by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show a checkpoint's format, layers and sizes, from its headers alone."""
    ledger = open_ledger(locate(checkpoint, revision))
    found = survey(ledger)
    if as_json:
        print(json.dumps(to_json(ledger, found), indent=2))
    else:
        Console().print(to_tables(ledger, found))


def to_json(ledger: Ledger, found: Survey) -> dict[str, Any]:
    """What ``--json`` prints; sizes in bytes."""
    scheme = ledger.scheme
    return {
        "checkpoint": str(ledger.folder),
        "architectures": ledger.config.get("architectures") or [],
        "format": None
        if scheme is None
        else {
            "quant_method": scheme.method,
            "layouts": dict(_layouts(ledger)),
            "scale_dtypes": sorted({weight.scale.dtype for weight in ledger.quantized.values()}),
            "scale_format": scheme.scale_format,
            "activation": scheme.activation,
        },
        "groups": [
            {
                "layers": group.layers,
                "part": group.part,
                "storage": group.storage,
                "why": group.why,
                "matrices": group.matrices,
                "bytes": group.nbytes,
            }
            for group in found.groups
        ],
        "kinds": {name: {"tensors": kind.tensors, "bytes": kind.nbytes} for name, kind in found.kinds.items()},
        "files": [{"name": name, "tensors": tensors, "bytes": size} for name, tensors, size in _files(ledger)],
        "ignored": ledger.ignored,
        "accounting": {
            "tensors": len(ledger.entries),
            "accounted": found.total.tensors,
            "bytes": found.total.nbytes,
            "result": _accounted(ledger, found),
        },
    }


def to_tables(ledger: Ledger, found: Survey) -> Group:
    """The same for a person; sizes in decimal GB, or MB below one."""
    # A tiny checkpoint would show as zeros.
    unit, size = ("GB", 1e9) if found.total.nbytes >= 1e9 else ("MB", 1e6)
    layers = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("layers", "right"), ("part", "left"), ("storage", "left"), ("matrices", "right")):
        layers.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    layers.add_column(unit, justify="right", no_wrap=True)
    layers.add_column("why", overflow="fold")
    for group in found.groups:
        # The storage column has said it.
        why = group.why.removeprefix(f"{group.storage.removeprefix('FP8 ')} FP8 ")
        amounts = f"{group.matrices:,}", f"{group.nbytes / size:,.3f}"
        layers.add_row(group.layers, group.part, group.storage, *amounts, escape(why))
    kinds = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("kind", "tensors", unit):
        kinds.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    for name, kind in found.kinds.items():
        kinds.add_row(name, f"{kind.tensors:,}", f"{kind.nbytes / size:,.3f}")
    kinds.add_section()
    kinds.add_row("total", f"{found.total.tensors:,}", f"{found.total.nbytes / size:,.3f}")
    return Group(escape(_headline(ledger)), layers, kinds, *_ignored(ledger), _accounted(ledger, found))


def _headline(ledger: Ledger) -> str:
    name = ", ".join(ledger.config.get("architectures") or ["unknown architecture"])
    if ledger.scheme is None:
        return f"{name}, not quantized"
    scales = "/".join(sorted({weight.scale.dtype for weight in ledger.quantized.values()}))
    layouts = ", ".join(layout for layout, _ in _layouts(ledger).most_common())
    activation = ledger.scheme.activation.replace("-", " per ", 1).replace("none per ", "none")
    ue8m0 = " (powers of two)" if ledger.scheme.scale_format == "ue8m0" else ""
    return (
        f"{name}, {ledger.scheme.method}: FP8 weights ({layouts or 'none stored'}), scales {scales or 'none'}{ue8m0}, "
        f"activations {activation}"
    )


def _layouts(ledger: Ledger) -> Counter[str]:
    return Counter(str(weight.layout) for weight in ledger.quantized.values())


def _files(ledger: Ledger) -> list[tuple[str, int, int]]:
    tensors = Counter(entry.file.name for entry in ledger.entries.values())
    return [(file.name, tensors[file.name], file.stat().st_size) for file in ledger.files]


def _ignored(ledger: Ledger) -> list[str]:
    return [f"ignored: {count:,} x {escape(reason)}" for reason, count in Counter(ledger.ignored.values()).items()]


def _accounted(ledger: Ledger, found: Survey) -> str:
    assert found.total.tensors == len(ledger.entries)
    files = f"{len(ledger.files)} file{'s' if len(ledger.files) > 1 else ''}"
    return f"Every one of {len(ledger.entries):,} tensors in {files} is accounted for."
