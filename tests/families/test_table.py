"""The table against the installed transformers: every experts class is in it, under what octavo says of it."""

from pathlib import Path

import pytest

from octavo.integrations.experts import experts_layout, why_not_ours

from . import table
from .discovery import experts_classes, undecorated_classes
from .tiny import class_called, tiny_experts


def test_every_experts_class_is_classified() -> None:
    unknown = sorted(experts_classes().keys() - set(table.ALL))
    assert not unknown, (
        f"transformers {table.INSTALLED} has experts classes that tests/families/table.py lacks: {unknown}"
    )


@pytest.mark.skipif(table.INSTALLED != table.NEWEST, reason=f"the table is that of transformers {table.NEWEST}")
def test_the_table_holds_nothing_else() -> None:
    assert len(set(table.ALL)) == len(table.ALL)
    assert sorted(table.ALL) == sorted(experts_classes())
    assert sorted(undecorated_classes()) == sorted(table.UNDECORATED)


@pytest.mark.parametrize("name", table.ALL)
def test_octavo_says_of_a_class_what_the_table_says(name: str) -> None:
    experts = tiny_experts(class_called(name))
    assert experts_layout(experts) is not None
    assert why_not_ours(experts, float8=True) == (table.PLAIN_ONLY | table.NOT_OURS).get(name)
    assert why_not_ours(experts, float8=False) == table.NOT_OURS.get(name)


PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def page() -> str:
    """``docs/families.md``, from the table."""
    rows = [(name, "FP8 and plain", "") for name in table.FLOAT8 if name not in table.STACKED_ON_DISK]
    stacked = (
        "checkpoints keep a layer's experts in one tensor, and no FP8 format that octavo reads says how its scales lie"
    )
    rows += [(name, "plain; the layers around them FP8 or plain", stacked) for name in table.STACKED_ON_DISK]
    rows += [(name, "plain", reason) for name, reason in table.PLAIN_ONLY.items()]
    rows += [(name, "stock forward", reason) for name, reason in table.NOT_OURS.items()]
    rows += [(name, "stock forward", "transformers does not declare its layout") for name in table.UNDECORATED]
    lines = [f"| `{name}` | {status} | {reason} |" for name, status, reason in sorted(rows)]
    return "\n".join(
        [
            "# Families of experts",
            "",
            f"Every class of stacked experts in transformers {table.NEWEST}, and how its weights run. *FP8 and "
            f"plain*: both on octavo's",
            "forward, LoRA on the stacks included. *Plain*: only unquantized stacks. *Stock forward*: unquantized "
            "stacks stay",
            "on transformers' own code, and FP8 ones are refused by name. A test builds each class and compares "
            "outputs and gradients.",
            "",
            "| class | runs as | because |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


@pytest.mark.skipif(table.INSTALLED != table.NEWEST, reason=f"the page is that of transformers {table.NEWEST}")
def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text("utf-8") == page()
