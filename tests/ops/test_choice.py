"""Which engine a layer gets: the capability table, the rule, and what each refusal says."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from octavo.errors import EngineError
from octavo.ops import capability, choice
from octavo.ops.capability import Runs, architecture_of, architectures, nvidia_row
from octavo.ops.choice import ENGINES, NUMERICS, Layer, choose, rules, select
from octavo.ops.engines import ProductEngine
from octavo.ops.weights import WeightSpec

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
GLM = Layer("experts", CUDA, torch.bfloat16, "channel", (1, 2048), (1536, 2048, 2048, 1536))
PLAIN = replace(GLM, layout="none", block=None, plain=torch.bfloat16)
QWEN = replace(GLM, layout="block", block=(128, 128), widths=(768, 2048, 2048, 768))


@pytest.fixture
def on(monkeypatch):
    """``on("sm90")``: CUDA devices are of that architecture, and triton is there."""

    def pretend(name: str, triton: bool = True) -> None:
        capability.architecture_of.cache_clear()
        choice.choose.cache_clear()
        monkeypatch.setattr(capability, "_row", lambda device: "cpu" if device.type == "cpu" else name)
        monkeypatch.setattr(choice, "triton_missing", lambda: None if triton else "triton is not installed")

    yield pretend
    monkeypatch.undo()
    capability.architecture_of.cache_clear()
    choice.choose.cache_clear()


def test_every_row_of_the_table_has_a_reason_where_it_says_no() -> None:
    assert {"cpu", "sm80", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx950", "other"} == set(architectures())
    for row in architectures().values():
        for ability in (row.torch, row.kernels, row.scaled_mm):
            assert ability.runs in get_args(Runs)
            assert bool(ability.why) == (ability.runs != "yes"), row


@pytest.mark.parametrize(
    ("capability", "row"),
    [((7, 5), "other"), ((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((10, 3), "sm100"),
     ((12, 1), "sm120"), ((11, 0), "other")],
)  # fmt: skip
def test_compute_capabilities(capability: tuple[int, int], row: str) -> None:
    assert nvidia_row(*capability) == row
    assert row in architectures()


def test_every_rule_names_engines_that_compute_its_numerics_and_its_source() -> None:
    for rule in rules():
        assert rule["source"]
        assert set(rule["architecture"]) <= {"any", *architectures()}
        assert rule["steps"][-1][0] is None
        limits = [most for most, _ in rule["steps"][:-1]]
        assert limits == sorted(limits)
        for _, engine in rule["steps"]:
            for numerics in NUMERICS if rule["numerics"] == ["any"] else rule["numerics"]:
                choice.check(engine, numerics)


@pytest.mark.parametrize("kind", ["experts", "linear"])
@pytest.mark.parametrize("name", sorted(architectures()))
def test_auto_takes_something_everywhere(on, name: str, kind: str) -> None:
    on(name)
    for numerics in NUMERICS:
        for layer in (GLM, QWEN, replace(GLM, dtype=torch.float32), replace(GLM, layout="none", block=None)):
            found = choose("auto", numerics, replace(layer, kind=kind))
            for rows in (0, 1, 200, 10**6):
                assert found.at(rows).name in ENGINES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": torch.float32}, "bfloat16 activations, not torch.float32"),
        ({"widths": (1536, 2048, 2048, 1544)}, "multiples of 16, and this layer has 1544"),
        ({"layout": "block", "block": (64, 64)}, "blocks of 128x128, and these are 64x64"),
        ({"layout": "block", "block": (128, 128), "widths": (208, 2048)}, "208 is not a multiple of 128"),
    ],
)
def test_what_kernels_do_not_take(on, change: dict, says: str) -> None:
    """auto passes to the next engine and says which; the engine by name is refused with the reason."""
    on("sm90")
    layer = replace(GLM, **change)
    found = choose("auto", "fp8", layer)
    assert found.largest.name == "reference"
    assert says in str(found)
    with pytest.raises(EngineError, match=f"engine 'scaled' cannot run this layer: .*{says}.*Choose engine 'auto'"):
        choose("scaled", "fp8", layer)


def test_without_triton(on) -> None:
    on("sm90", triton=False)
    assert type(select("auto", "exact", GLM)) is ProductEngine
    assert str(choose("auto", "exact", GLM)) == (
        "dequant; not fused: triton is not installed; not kernels: triton is not installed"
    )
    assert str(choose("auto", "fp8", GLM)) == "reference; not scaled: triton is not installed"
    with pytest.raises(EngineError, match="triton is not installed"):
        choose("fused", "exact", GLM)


def test_what_was_never_run_there_is_taken_by_name_only(on) -> None:
    on("sm100")
    assert choose("auto", "fp8", GLM).largest.name == "reference"
    assert "never run on SM100" in str(choose("auto", "fp8", GLM))
    assert choose("scaled", "fp8", GLM).largest.name == "scaled"
    on("gfx942")
    with pytest.raises(EngineError, match="FNUZ"):
        choose("scaled", "fp8", GLM)


def test_a_name_that_speaks_of_codes_leaves_plain_stacks_alone(on) -> None:
    """A mixed checkpoint under engine='fused'."""
    on("sm90")
    assert choose("fused", "exact", PLAIN).largest.name == "dequant"
    assert choose("fused", "exact", GLM).largest.name == "fused"
    assert choose("scaled", "fp8", PLAIN).largest.name == "dequant"


def test_plain_stacks_run_on_kernels(on) -> None:
    """As they are stored, in bfloat16, where octavo's kernels run; what keeps them from it is shown."""
    from octavo.ops.fused import KernelEngine

    on("sm90")
    for name in ("auto", "dequant", "fused"):
        found = choose(name, "exact", PLAIN)
        assert str(found) == "dequant"
        assert type(found.largest) is KernelEngine
    for change, says in (
        ({"plain": torch.float32}, "take unquantized weights in bfloat16, and these are torch.float32"),
        ({"dtype": torch.float32}, "take bfloat16 activations, not torch.float32"),
        ({"widths": (1544, 2048)}, "multiples of 16, and this layer has 1544"),
    ):
        found = choose("auto", "exact", replace(PLAIN, **change))
        assert type(found.largest) is ProductEngine
        assert str(found).startswith("dequant; not kernels: ")
        assert says in str(found)
    on("sm80")
    assert str(choose("auto", "exact", PLAIN)) == "dequant"
    assert type(select("auto", "exact", PLAIN)) is ProductEngine


def test_biases_run_on_every_engine_and_not_in_the_products_for_hopper(on, monkeypatch) -> None:
    from octavo.ops.fused import KernelEngine
    from octavo.ops.hopper import compiler
    from octavo.ops.hopper.engine import HopperEngine

    on("sm90")
    monkeypatch.setattr(compiler, "missing", lambda: None)
    for numerics, name in (("exact", "fused"), ("fp8", "scaled"), ("exact", "dequant")):
        assert type(choose(name, numerics, GLM).largest) is HopperEngine
        found = choose(name, numerics, replace(GLM, bias=True)).largest
        assert (type(found), found.name) == (KernelEngine, name)
    assert type(choose("dequant", "exact", PLAIN).largest) is KernelEngine


def test_facts_of_a_layer() -> None:
    codes, stack = torch.empty((4, 64, 32), dtype=torch.uint8), torch.empty((4, 32, 48), dtype=torch.bfloat16)
    specs = WeightSpec(True, 2, (1, 32)), WeightSpec(False, transposed=True)
    layer = choice.experts_layer(CPU, None, ((specs[0], codes), (specs[1], stack)), bias=False)
    assert layer == Layer("experts", CPU, None, "channel", (1, 32), (32, 32, 48, 32), False, torch.bfloat16)
    layer = choice.experts_layer(CPU, None, ((specs[0], codes), (specs[0], codes)), bias=True)
    assert (layer.plain, layer.bias) == (None, True)


def test_the_cpu_is_as_it_was() -> None:
    for layer in (replace(GLM, device=CPU), Layer()):
        assert str(choose("auto", "exact", layer)) == "dequant"
        assert str(choose("auto", "fp8", layer)) == "reference"
        assert type(select("auto", "exact", layer)) is ProductEngine
    assert architecture_of(CPU).name == "cpu"
    assert architecture_of(torch.device("xpu")).name == "other"
