"""``docs/families.md``, from the table and the classes. ``python -m tests.families.page`` writes it again."""

from pathlib import Path

from octavo.integrations.experts import gate_of
from octavo.ops.gates import SWIGLU

from . import table
from .discovery import causal_lm_class, experts_classes
from .tiny import tiny_experts

PAGE = Path(__file__).parents[2] / "docs" / "families.md"

_HEAD = f"""# Families of experts

Every class of stacked experts in transformers {table.NEWEST}, and how its weights run.

- *FP8 and plain*: FP8 and unquantized experts run on octavo's forward, LoRA on them included.
- *Plain*: unquantized experts run on octavo's forward, FP8 ones are refused for the reason given. The layers around
  them may be FP8 either way.
- *Stock forward*: unquantized experts stay on transformers' own code, with a warning, and FP8 ones are refused.

*Model* is what `octavo.load_model` builds. Where it says *enabled*, `AutoModelForCausalLM` builds nothing, and the
model's own class loads inside `octavo.enabled()`. *Gate* is `SwiGLU` where engines know the gate by name; any other
is the class's own code, differentiated by autograd.

A test builds each class and compares outputs and gradients with the class's own forward, and another each model.

| class | model | runs as | gate | because |
|---|---|---|---|---|
"""
_STACKED = (
    "checkpoints keep a layer's experts in one tensor, and no FP8 format that octavo reads says how its scales lie"
)
_SPLIT = "transformers distributes the experts of a layer over two modules while loading"
_UNDECLARED = "transformers does not declare its layout"


def page() -> str:
    """The whole page; needs the version of transformers that the table was written for."""
    rows = [_row(name) for name in table.ALL]
    rows += [f"| `{name}` |  | stock forward |  | {_UNDECLARED} |" for name in table.UNDECORATED]
    return _HEAD + "\n".join(sorted(rows)) + "\n"


def _row(name: str) -> str:
    cls = experts_classes()[name]
    model = causal_lm_class(cls)
    built = "enabled" if model is None else f"`{model.__name__}`"
    runs, why = _status(name)
    gate = "" if name in table.NOT_OURS else "SwiGLU" if gate_of(tiny_experts(cls)) is SWIGLU else "own"
    return f"| `{name}` | {built} | {runs} | {gate} | {why} |"


def _status(name: str) -> tuple[str, str]:
    if name in table.NOT_OURS:
        return "stock forward", table.NOT_OURS[name]
    if name in table.PLAIN_ONLY:
        return "plain", table.PLAIN_ONLY[name]
    if name in table.STACKED_ON_DISK:
        return "plain", _STACKED
    if name in table.SPLIT_WHILE_LOADING:
        return "plain", _SPLIT
    return "FP8 and plain", ""


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
