"""The table against the installed transformers: every experts class is in it, under what octavo says of it."""

import pytest

from octavo.integrations.experts import experts_layout, why_not_ours

from . import table
from .discovery import causal_lm_class, experts_classes, undecorated_classes
from .page import PAGE, page
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
    without = [name for name, cls in experts_classes().items() if causal_lm_class(cls) is None]
    assert sorted(without) == sorted(table.NO_CAUSAL_LM)


@pytest.mark.parametrize("name", table.ALL)
def test_octavo_says_of_a_class_what_the_table_says(name: str) -> None:
    experts = tiny_experts(class_called(name))
    assert experts_layout(experts) is not None
    assert why_not_ours(experts, float8=True) == (table.PLAIN_ONLY | table.NOT_OURS).get(name)
    assert why_not_ours(experts, float8=False) == table.NOT_OURS.get(name)


@pytest.mark.skipif(table.INSTALLED != table.NEWEST, reason=f"the page is that of transformers {table.NEWEST}")
def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text("utf-8") == page(), "write docs/families.md again: python -m tests.families.page"
