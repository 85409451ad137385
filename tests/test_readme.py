"""What the README says is done: its blocks run in order, in one empty folder, as a reader would run them.

A comment before a block says what is different about it: ``file: NAME`` is written to that file; ``needs: set-up``
makes an environment and ``needs: hub`` downloads a large model, so those are only checked for names, options and
targets that exist.
"""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

import octavo
from octavo.cli.main import VERBS, load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS = ("set-up", "hub")
SECONDS = 300


class Block(NamedTuple):
    """A fenced block: its language, text, line, and the comment before it (`file` or `needs`, and its value)."""

    language: str
    text: str
    line: int
    key: str | None
    value: str | None

    def __str__(self) -> str:
        return f"README.md:{self.line}"


def blocks() -> list[Block]:
    fence = re.compile(r"(?:^<!-- (\w+): (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(found[3], found[4], README.count("\n", 0, found.start(3)) + 1, found[1], found[2])
        for found in fence.finditer(README)
    ]


MARKED = [block for block in blocks() if block.key == "needs"]


def test_every_block_is_known():
    assert README.count("\n```") == 2 * len(blocks())
    assert "python" in {block.language for block in blocks()}
    for block in blocks():
        assert block.key in (None, "file", "needs"), f"{block}: {block.key}"
        assert block.key != "needs" or block.value in NEEDS, f"{block}: {block.value}"
        assert block.key == "file" or block.language in ("python", "bash"), f"{block}: nothing checks it"


def test_blocks_run_in_order(tmp_path):
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
    }
    for block in blocks():
        if block.key == "file":
            (tmp_path / block.value).write_text(block.text)
        elif block.key is None:
            command = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}[block.language]
            run = subprocess.run(
                [*command, block.text],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
            )
            assert run.returncode == 0, f"{block} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("block", [block for block in MARKED if block.language == "python"], ids=str)
def test_marked_python_uses_what_exists(block):
    tree = ast.parse(block.text)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "octavo":
            target = getattr(octavo, node.attr)
            used += 1
            if call := calls.get(id(node)):
                inspect.signature(target).bind(*call.args, **{word.arg: word.value for word in call.keywords})
        if isinstance(node, ast.ImportFrom):
            module = import_module(node.module)
            assert all(getattr(module, alias.name) for alias in node.names)
    assert used, f"{block} uses nothing of octavo's"


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=line)
        for block in MARKED
        if block.language == "bash"
        for line in block.text.splitlines()
        if line
    ],
)
def test_marked_command_exists(line):
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        run = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
    elif words[:2] == ["pip", "install"]:
        extra = re.fullmatch(r"\.\[(\w+)\]", words[2])[1]
        assert extra in PROJECT["optional-dependencies"]
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    else:
        assert "octavo" in words, f"nothing checks {line!r}"
        _, verb, *arguments = words[words.index("octavo") :]
        known = {option for parameter in load(verb).params for option in parameter.opts}
        assert {word.partition("=")[0] for word in arguments if word.startswith("--")} <= known


def test_table_of_verbs_is_the_command_line():
    section = README.partition("## From the command line")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `octavo (\w+)", section, re.MULTILINE) == list(VERBS)


def test_versions_are_the_published_ones():
    extras = PROJECT["optional-dependencies"]
    bounds = {one.name: one for one in map(Requirement, PROJECT["dependencies"] + extras["train"])}
    said = dict(re.findall(r"(torch|transformers|peft|trl) ≥ ([\d.]+\d)", README))
    assert said.keys() == {"torch", "transformers", "peft", "trl"}
    assert all(str(bounds[name].specifier) == f">={version}" for name, version in said.items())
    assert f"Python ≥ {PROJECT['requires-python'].removeprefix('>=')}" in README


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []
