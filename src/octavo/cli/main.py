"""``octavo VERB``: the table of verbs, and what each way of failing prints and returns.

Exit codes: 0; 1 for what the user can put right, told in one message; 2 for a wrong call; 130 after ctrl-C.
"""

import errno
import json
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from octavo import __version__
from octavo.errors import OctavoError


class Verb(NamedTuple):
    """``octavo NAME`` calls the function NAME of ``module``; ``help`` is its line in the overview."""

    module: str
    help: str


VERBS = {
    "demo": Verb("octavo.cli.demo", "Fine-tune the small FP8 model that ships with octavo, and show that it learned."),
    "inspect": Verb("octavo.cli.inspect", "Show a checkpoint's format, layers and sizes, from its headers alone."),
    "plan": Verb("octavo.cli.plan", "Plan the memory of a run by term, and what to change where it does not fit."),
    "sft": Verb("octavo.cli.sft", "Fine-tune a model on examples, as a YAML file says."),
    "grpo": Verb("octavo.cli.grpo", "Train a model on rewards (GRPO), as a YAML file says."),
    "doctor": Verb("octavo.cli.doctor", "Show what this machine can run, and test that it computes the right thing."),
    "bench": Verb("octavo.cli.bench", "Measure a layer, or whole training steps, beside their baselines."),
    "chat": Verb("octavo.cli.chat", "Talk to a model with its trained adapter."),
}

# Imported by verbs that train, and absent without the extra.
TRAIN_PACKAGES = frozenset({"accelerate", "compressed_tensors", "datasets", "trackio", "trl"})

_INTERRUPTED = 130
_JSON = "octavo.json"

# click's own types have no public name: old releases of typer depend on click, new ones carry it within.
ClickContext = Any
ClickCommand = Any


class LazyGroup(TyperGroup):
    """Imports a verb's module when that verb is called, so that help and `inspect` start without torch."""

    def parse_args(self, ctx: ClickContext, args: list[str]) -> list[str]:
        """Note whether the answer is wanted as JSON: an error has to know before the verb has parsed its options."""
        ctx.meta[_JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: ClickContext, args: list[str]) -> tuple[str | None, ClickCommand | None, list[str]]:
        """Put the real command in the place of the overview's line."""
        if args[0] in VERBS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: ClickContext) -> Any:
        """Run the verb; tell what the user can put right in one message, let our own bugs through with a traceback."""
        try:
            return super().invoke(ctx)
        except OctavoError as error:
            complain(str(error), as_json=ctx.meta[_JSON])
        except ModuleNotFoundError as error:
            if error.name not in TRAIN_PACKAGES:
                raise
            complain(
                f"this needs {error.name}, which is not installed. Run: pip install 'octavo[train]'",
                as_json=ctx.meta[_JSON],
            )
        except OSError as error:
            # A reader that left the pipe is handled by typer, without a word.
            if error.errno == errno.EPIPE:
                raise
            complain(str(error), as_json=ctx.meta[_JSON])
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted")
            raise typer.Exit(_INTERRUPTED) from None
        raise typer.Exit(1)


def load(name: str) -> ClickCommand:
    """The command of the verb ``name``, its module imported."""
    verb = getattr(import_module(VERBS[name].module), name)
    if isinstance(verb, typer.Typer):
        # Several commands under one verb.
        return typer.main.get_command(verb)
    single = typer.Typer(add_completion=False)
    single.command(name)(verb)
    return typer.main.get_command(single)


def complain(message: str, *, as_json: bool) -> None:
    """Print an error: for a program as ``{"error": …}`` on stdout, for a person on stderr."""
    if as_json:
        print(json.dumps({"error": message}))
    else:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"octavo {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune FP8 mixture-of-experts checkpoints as they are."""


def _in_overview() -> None:
    """Stands for a verb in the overview; `LazyGroup` replaces it before anything runs."""


def build() -> typer.Typer:
    """The application with a line for each verb."""
    app = typer.Typer(
        cls=LazyGroup,
        no_args_is_help=True,
        add_completion=False,
        # A pretty traceback prints the locals: here, tensors.
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, verb in VERBS.items():
        app.command(name, help=verb.help)(_in_overview)
    return app


app = build()


def main() -> None:
    """The console script."""
    app()
