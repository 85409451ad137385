"""``octavo chat ADAPTER``."""

import json
import sys
from typing import Annotated, Literal

import typer
from rich.console import Console


def chat(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, the folder of a run of `sft`, or a hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this once and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token; above, it samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this much of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    base: Annotated[str | None, typer.Option(help="The model, where the adapter's own record is out of date.")] = None,
    numerics: Annotated[
        Literal["exact", "fp8_grad", "fp8"], typer.Option(help="Arithmetic of FP8 products.")
    ] = "exact",
    engine: Annotated[str, typer.Option(help="How products are computed.")] = "auto",
    experts: Annotated[
        Literal["resident", "host"], typer.Option(help="Where FP8 experts are kept; host streams all for each token.")
    ] = "resident",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Dtype of what is not FP8.")] = "bfloat16",
    graphs: Annotated[
        Literal["auto", "true", "false"], typer.Option(help="Each token as one CUDA graph; auto: where it can be.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer to --prompt as JSON.")] = False,
) -> None:
    """Talk to a model with its trained adapter. An empty line ends the conversation, /reset begins another."""
    if as_json and prompt is None:
        raise typer.BadParameter("--json needs --prompt: a conversation has no one result.")
    # Imported here: --help should not wait for torch.
    import torch

    from octavo.train.chat import Sampling, load_chat

    console = Console(stderr=as_json)
    with console.status("loading", spinner="dots"):
        session = load_chat(
            adapter,
            base=base,
            numerics=numerics,
            engine=engine,
            experts=experts,
            dtype=dtype,
            graphs="auto" if graphs == "auto" else graphs == "true",
        )
    torch.manual_seed(seed)
    sampling = Sampling(max_new_tokens, temperature, top_p)
    opening = [{"role": "system", "content": system}] if system is not None else []

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if prompt is not None:
        turns = [*opening, {"role": "user", "content": prompt}]
        answer = session.answer(turns, sampling, None if as_json else show)
        result = {"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "seconds": answer.seconds}
        print(json.dumps(result) if as_json else "")
        return
    turns = list(opening)
    while line := _ask(console):
        if line == "/reset":
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": line})
        answer = session.answer(turns, sampling, show)
        print()
        turns.append({"role": "assistant", "content": answer.text})


def _ask(console: Console) -> str:
    """The next line of a person; empty at the end of the input."""
    try:
        return console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
