"""``octavo bench layer`` and ``octavo bench model``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from octavo.cli.trial import trial

if TYPE_CHECKING:
    from octavo.bench.run import Measured
    from octavo.bench.shapes import LayerShape

_SIZES = ("experts", "top_k", "hidden", "intermediate")


bench = typer.Typer(name="bench", no_args_is_help=True, add_completion=False)
bench.command("model")(trial)


@bench.command("layer")
def layer(
    model: Annotated[
        str | None, typer.Option(help="Take the sizes of this checkpoint: a folder, a cached hub id, glm or qwen3.")
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of the layer.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts a token.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Expert intermediate size.")] = None,
    layout: Annotated[Literal["channel", "tensor", "block"] | None, typer.Option(help="Scales of the weights.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Tokens of a step; may be given twice.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="LoRA rank on both projections; 0 for none.")] = 16,
    numerics: Annotated[
        list[str] | None, typer.Option(help="Only these numerics: exact, fp8_grad, fp8; may be given twice.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the rows to this JSON file as well.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON; the rest goes to stderr.")] = False,
) -> None:
    """Time one MoE layer, forward and backward with LoRA, beside bf16 and dequantizing baselines.

    Every way is compared with float64 first, and no time is shown for a wrong one. Exit code 1 if one was wrong.
    Without sizes: those of Qwen3-30B-A3B on a GPU, and a small layer on the CPU.
    """
    # Imported here: --help should not wait for torch.
    from octavo.bench.layer import LayerCase
    from octavo.bench.run import default_device, headline, measure, ways
    from octavo.ops.choice import NUMERICS, check

    console = Console(stderr=as_json)
    device = default_device()
    sizes = dict(zip(_SIZES, (experts, top_k, hidden, intermediate), strict=True))
    shape = _shape(model, sizes, layout, small=device.type == "cpu")
    for mode in numerics or []:
        check("auto", mode)
    modes = tuple(mode for mode in NUMERICS if not numerics or mode in numerics)
    rows, wrong = [], False
    for count in tokens or ([2048, 8192] if device.type == "cuda" else [256]):
        case = LayerCase(shape, count, device, rank)
        console.print(escape(headline(shape, count, rank, device)), soft_wrap=True)
        chosen, left = ways(case, modes)
        for found in measure(case, chosen):
            console.print(_line(found), soft_wrap=True, highlight=False)
            wrong |= found.row is None
            if found.row is not None:
                rows.append(found.row)
            if out is not None:
                # Whole after every row: the process may be cut off at any time.
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(rows, indent=1) + "\n")
        for mode, name, why in left:
            console.print(f"  [dim]{mode:8s} {name:12s} not run: {escape(why)}[/]", soft_wrap=True, highlight=False)
    if as_json:
        print(json.dumps(rows, indent=1))
    if wrong:
        raise typer.Exit(1)


def _shape(
    model: str | None,
    sizes: dict[str, int | None],
    layout: Literal["channel", "tensor", "block"] | None,
    *,
    small: bool,
) -> LayerShape:
    from octavo.bench.shapes import MODELS, LayerShape, layout_of, shape_of
    from octavo.cli.locate import locate

    given = {name: size for name, size in sizes.items() if size is not None}
    if model is not None:
        if given:
            flag = "--" + next(iter(given)).replace("_", "-")
            raise typer.BadParameter(f"{flag} and --model both say how large the layer is; give one of them.")
        if model in MODELS and not Path(model).exists():
            return MODELS[model]
        return shape_of(locate(model), layout)
    if given and len(given) < len(sizes):
        missing = ", ".join("--" + name.replace("_", "-") for name in sizes if name not in given)
        raise typer.BadParameter(f"{missing} is missing: without --model all four sizes are needed, or none.")
    if given:
        return LayerShape("custom", layout=layout_of(layout or "channel"), **given)
    if small:
        return LayerShape("small", 8, 2, 256, 128, layout_of(layout or "block"))
    return MODELS["qwen3"]


def _line(found: Measured) -> str:
    way, row = found.way, found.row
    label = f"{way.numerics:8s} {way.engine:12s}"
    if row is None:
        return f"  {label} [red]{escape(found.problem)}[/]"
    floor = "" if row["ratio"] is None else f"  {row['ratio']:6.2f} x floor"
    memory = "" if row["peak_transient_mib"] is None else f"  {row['peak_transient_mib']:7.0f} MiB"
    what = "" if row["pass"] == "fwd+bwd" else f"  ({row['pass']}, {row['layout']} scales, no LoRA, eager)"
    busy = "" if row["busy_ms"] is None else f"  busy {row['busy_ms']:9.3f}"
    times = f"{row['ms']:9.3f} ms{floor}{busy}  eager {row['eager_ms']:9.3f}{memory}"
    return f"  {label} {times}  error {row['rel_err']:.1e}" + ("  <- auto" if way.picked else what)
