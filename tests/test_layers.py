"""Imports point one way, the bottom needs torch alone, and ``import octavo`` costs nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "octavo"

# Each layer may import itself and what its line names; errors.py is open to all.
MAY_IMPORT = {
    "formats": set(),
    "checkpoint": {"formats"},
    "ops": {"formats"},
    "nn": {"ops", "formats"},
    "bench": {"ops", "formats", "checkpoint"},
    "doctor": {"bench", "ops", "formats", "checkpoint"},
    "integrations": {"nn", "ops", "formats", "checkpoint"},
    "plan": {"integrations", "nn", "ops", "formats", "checkpoint"},
    "train": {"plan", "integrations", "nn", "ops", "formats", "checkpoint"},
    "trial": {"train", "plan", "integrations", "nn", "ops", "formats", "checkpoint"},
    "demo": {"train", "integrations", "nn", "ops", "formats", "checkpoint"},
    "cli": {"bench", "trial", "doctor", "demo", "plan", "train", "integrations", "nn", "ops", "formats", "checkpoint"},
}
# Third-party packages of the layers below the integrations.
NEEDS_ONLY = {
    "formats": {"torch"},
    "checkpoint": {"torch", "safetensors"},
    "ops": {"torch"},
    "nn": {"torch"},
}
# Where triton, which torch brings on machines with a GPU, may be imported.
HOPPER = "ops/hopper/"
KERNELS = "ops/kernels"
# Names of the facade in octavo/__init__.py and the layer that each comes from.
FACADE = {"load_model": "integrations", "enabled": "integrations", "configure": "integrations"}
FACADE |= {"describe": "integrations", "lora_config": "integrations", "demo": "demo"}
FACADE |= {"generate": "integrations"}

HEAVY = ["torch", "transformers", "peft", "trl", "triton", "datasets", "numpy"]


class Import(NamedTuple):
    """One imported name: where it is written, and its full dotted name."""

    where: str
    layer: str
    name: str


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def dotted(path: Path, node: ast.AST) -> list[str]:
    """The dotted names that ``node`` imports, relative ones resolved."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["octavo", *path.relative_to(SOURCE).parent.parts]
    base = package[: len(package) - node.level + 1] if node.level else []
    return [".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names]


def imports() -> list[Import]:
    found = []
    for path, tree in parsed():
        relative = path.relative_to(SOURCE)
        layer = relative.parts[0] if len(relative.parts) > 1 else ""
        for node in ast.walk(tree):
            found += [Import(f"{relative}:{node.lineno}", layer, name) for name in dotted(path, node)]
    return found


def layer_of(name: str) -> str | None:
    """The layer that ``octavo.…`` lies in; None for the top: errors, the version and the package itself."""
    part = name.split(".")[1] if "." in name else ""
    return part if part in MAY_IMPORT else FACADE.get(part)


def test_every_folder_is_a_layer_with_a_place():
    folders = {path.relative_to(SOURCE).parts[0] for path, _ in parsed() if path.parent != SOURCE}
    assert folders <= MAY_IMPORT.keys(), f"give {folders - MAY_IMPORT.keys()} a place in MAY_IMPORT"


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_down(layer):
    allowed = MAY_IMPORT[layer] | {layer, None}
    wrong = [
        f"{found.where} imports {found.name}"
        for found in imports()
        if found.layer == layer and found.name.split(".")[0] == "octavo" and layer_of(found.name) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def allowed_beside(where: str) -> set[str]:
    """What kernels are written with: both come with torch's builds for GPUs."""
    return {"triton"} if where.startswith(KERNELS) else {"cuda"} if where.startswith(HOPPER) else set()


@pytest.mark.parametrize("layer", NEEDS_ONLY)
def test_lower_layers_need_torch_alone(layer):
    known = NEEDS_ONLY[layer] | sys.stdlib_module_names | {"octavo"}
    wrong = [
        f"{found.where} imports {found.name}"
        for found in imports()
        if found.layer == layer and found.name.split(".")[0] not in known | allowed_beside(found.where)
    ]
    assert not wrong, "\n".join(wrong)


def test_environment_decides_nothing_below_the_command_line():
    wrong = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path, tree in parsed()
        if "cli" not in path.relative_to(SOURCE).parts
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {"environ", "getenv"} & {a.name for a in node.names}
        )
    ]
    assert not wrong, f"environment variables are read at {wrong}"


def test_only_named_exceptions_are_caught():
    def is_blind(kind: ast.expr | None) -> bool:
        if isinstance(kind, ast.Tuple):
            return any(is_blind(part) for part in kind.elts)
        return kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException"))

    wrong = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and is_blind(node.type)
    ]
    assert not wrong, f"everything is caught at {wrong}"


def loaded_after(code: str) -> set[str]:
    """The heavy packages that a new interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import octavo; octavo.__version__; octavo.CheckpointError; dir(octavo)",
        "import octavo.cli.main",
        "from typer.testing import CliRunner; from octavo.cli.main import app; "
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
    ],
    ids=["import", "command line", "help"],
)
def test_starts_without_heavy_packages(code):
    assert loaded_after(code) == set()


def test_inspect_starts_without_torch():
    code = "from octavo.cli.main import load; load('inspect')"
    assert loaded_after(code) == set()


def test_importing_octavo_changes_nothing_in_transformers_or_peft():
    script = """
import peft.tuners.lora.layer as layer
from transformers.quantizers import auto
def state():
    return [dict(known) for known in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING, vars(layer))]
before = state()
import octavo
octavo.load_model, octavo.enabled, octavo.configure, octavo.describe, octavo.lora_config
assert state() == before
"""
    subprocess.run([sys.executable, "-c", script], check=True)
