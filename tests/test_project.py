"""The project's own files agree with each other: version, dependencies, constraints, changelog, decisions."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import octavo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Distributions whose module has another name.
DISTRIBUTION = {"yaml": "pyyaml"}
# See the head of constraints-lowest.txt.
LOWEST_ELSEWHERE = {"torch"}


def requirements(lines: list[str]) -> dict[str, Requirement]:
    """By canonical name; our own extras, which extras name, left out."""
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(one.name): one for one in parsed if one.name != "octavo"}


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = {}
    for line in lines:
        distribution, _, pinned = line.partition("==")
        assert pinned, f"{name} does not pin {line!r} to one version"
        found[canonicalize_name(distribution)] = Version(pinned)
    assert len(found) == len(lines), f"{name} pins something twice"
    return found


CORE = requirements(PROJECT["dependencies"])
DIRECT = CORE | requirements([line for lines in EXTRAS.values() for line in lines])
IN_LOWEST = CORE | requirements(EXTRAS["train"] + EXTRAS["test"])


def test_one_version():
    assert PROJECT["version"] == octavo.__version__


def test_changelog_has_the_version():
    titles = re.findall(r"^## \[?([\w.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert octavo.__version__ in titles


@pytest.mark.parametrize("name", DIRECT)
def test_tested_set_pins_every_direct_dependency(name):
    assert DIRECT[name].specifier.contains(pins("constraints.txt")[name])


@pytest.mark.parametrize("name", sorted(IN_LOWEST.keys() - LOWEST_ELSEWHERE))
def test_published_lower_bound_is_the_one_tested(name):
    (bound,) = IN_LOWEST[name].specifier
    assert bound.operator == ">="
    assert Version(bound.version) == pins("constraints-lowest.txt")[name]


def test_pins_carry_no_build_tag():
    tagged = [
        f"{name}=={pin}"
        for file in ("constraints.txt", "constraints-lowest.txt")
        for name, pin in pins(file).items()
        if pin.local
    ]
    assert not tagged, f"other machines have no such build: {tagged}"


def test_metadata_names_no_index():
    assert not [line for line in PROJECT["dependencies"] if Requirement(line).url]
    for file in ("constraints.txt", "constraints-lowest.txt", "Makefile", ".ci/run"):
        assert not re.search(r"--(extra-)?index-url|--find-links|https?://", (ROOT / file).read_text()), file


# triton and cuda (cuda-bindings) come with torch's builds for GPUs; torchao is an extra of its own, whose absence is told
GIVEN = sys.stdlib_module_names | {"octavo", "triton", "cuda", "torchao"}


def test_source_imports_only_what_is_declared():
    """The core's imports lie in the core's dependencies; train, demo and cli may use the extra `train`."""
    train = CORE | requirements(EXTRAS["train"])
    undeclared = []
    for path in sorted((ROOT / "src" / "octavo").rglob("*.py")):
        declared = train if {"train", "trial", "demo", "cli"} & set(path.parts) else CORE
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - GIVEN:
                if canonicalize_name(DISTRIBUTION.get(top, top)) not in declared:
                    undeclared.append(f"{path.name}:{node.lineno} {top}")
    assert not undeclared, undeclared


def test_every_public_name_resolves():
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    assert set(octavo.__all__) <= set(dir(octavo))


def test_unknown_name_says_so():
    with pytest.raises(AttributeError, match="'octavo' has no attribute 'lode_model'"):
        _ = octavo.lode_model


def test_public_names_are_where_the_type_checker_is_told():
    """The TYPE_CHECKING block and the table behind ``__getattr__`` name the same homes."""
    tree = ast.parse((ROOT / "src" / "octavo" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name: node.module for node in block.body for alias in node.names}
    for name, module in told.items():
        assert getattr(octavo, name) is getattr(importlib.import_module(module), name)
    lazy = set(octavo.__all__) - {"__version__"} - set(vars(importlib.import_module("octavo.errors")))
    assert told.keys() == lazy


def test_decisions_have_numbers_of_their_own_and_are_listed():
    folder = ROOT / "docs" / "decisions"
    records = sorted(path.name for path in folder.glob("[0-9]*.md"))
    numbers = [name[:4] for name in records]
    assert len(set(numbers)) == len(numbers)
    assert re.findall(r"^- .*\]\(([^)]+)\)", (folder / "README.md").read_text(), re.MULTILINE) == records
    for name in records:
        title = (folder / name).read_text().splitlines()[0]
        assert title.startswith(f"# {int(name[:4])}. "), f"{name} is titled {title!r}"


def test_every_folder_of_tests_is_a_package():
    """Two test files of one name in two folders would otherwise hide each other."""
    folders = {path.parent for path in (ROOT / "tests").rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
