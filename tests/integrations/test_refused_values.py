"""Damage that only the model's shapes and dtypes, or the values of activation scales, give away."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import octavo
from octavo.errors import AdapterError, CheckpointError
from octavo.formats.weight import quantize
from octavo.ops.routing import route
from tests.checkpoints import RECIPES, Built, copy_of, edit_tensors
from tests.nn.modules import float8_linear

EXPERT = "model.layers.1.mlp.experts.4"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("ct-tensor", f"{EXPERT}.up_proj.input_scale"),
        ("ct-tensor", f"{EXPERT}.down_proj.input_scale"),
        ("fp8-tensor", "model.layers.2.self_attn.q_proj.activation_scale"),
    ],
)
def test_bad_activation_scales_are_named(
    built: Callable[..., Built], tmp_path: Path, layout: str, key: str, value: float
) -> None:
    folder = copy_of(built(layout=layout), tmp_path / "copy")
    edit_tensors(folder, lambda tensors: tensors[key].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {key}'"):
        octavo.load_model(folder)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_integers_are_not_cast_to_weights(built: Callable[..., Built], tmp_path: Path, key: str) -> None:
    folder = copy_of(built(layout="ct-channel"), tmp_path / "copy")
    edit_tensors(folder, lambda tensors: tensors.__setitem__(key, tensors[key].to(torch.int8)))
    with pytest.raises(CheckpointError, match=rf"'{key}' is I8, expected BF16, F16, F32 or F64"):
        octavo.load_model(folder)


def test_a_routers_correction_that_is_nan_is_named(built: Callable[..., Built], tmp_path: Path) -> None:
    """It is a buffer, and would choose the same experts for every token."""
    folder, key = copy_of(built(layout="ct-channel", arch="glm"), tmp_path / "copy"), "mlp.gate.e_score_correction_bias"
    edit_tensors(folder, lambda tensors: tensors[f"model.layers.1.{key}"][0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"{key}' has 1 of 6 numbers that are NaN"):
        octavo.load_model(folder)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight"])
@pytest.mark.parametrize("layout", ["ct-channel", "bf16"])
def test_plain_weights_that_are_nan_are_named(
    built: Callable[..., Built], tmp_path: Path, key: str, layout: str
) -> None:
    """Before a step: an embedding's row may be met late."""
    folder = copy_of(built(layout=layout), tmp_path / "copy")
    edit_tensors(folder, lambda tensors: tensors[key].view(-1)[-1:].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"'{key}' has 1 of \d+ numbers that are NaN"):
        octavo.load_model(folder)


def test_gate_and_up_may_not_trade_rows(built: Callable[..., Built], tmp_path: Path) -> None:
    """160 rows each make a stack of 320, and so do 200 and 120."""
    recipe = RECIPES["ct-channel"]

    def reshape(tensors: dict[str, Tensor]) -> None:
        for expert in range(6):
            for name, rows in (("gate", 200), ("up", 120)):
                module = f"model.layers.1.mlp.experts.{expert}.{name}_proj"
                weight = quantize(torch.randn(rows, 192), recipe.layout, scale_dtype=recipe.dtype)
                tensors[f"{module}.weight"] = weight.codes[0, 0].clone()
                tensors[f"{module}.weight_scale"] = weight.scales[0, 0].to(recipe.dtype)

    folder = copy_of(built(layout="ct-channel"), tmp_path / "copy")
    edit_tensors(folder, reshape)
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight' has shape \[200, 192\], its place in .* has \[160, 192\]"
    ):
        octavo.load_model(folder)


def test_a_config_that_transformers_cannot_read(built: Callable[..., Built], tmp_path: Path) -> None:
    folder = copy_of(built(layout="ct-channel"), tmp_path / "copy")
    text = (folder / "config.json").read_text().replace('"qwen3_moe"', '"zzz"')
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*config.json: .*zzz"):
        octavo.load_model(folder)


def test_modules_to_save_that_match_nothing_are_refused(built: Callable[..., Built]) -> None:
    with pytest.raises(AdapterError, match="modules_to_save names 'nope'"):
        octavo.lora_config(octavo.load_model(built(layout="ct-channel").folder), modules_to_save=["nope"])


@pytest.mark.parametrize("index", [-1, 256])
def test_tokens_that_the_model_has_not_are_refused(built: Callable[..., Built], index: int) -> None:
    with pytest.raises(AdapterError, match=rf"names token {index}, and the model has embeddings of 0 to 255"):
        octavo.lora_config(built(layout="ct-channel").folder, trainable_token_indices=[3, index])


def test_the_output_of_an_fp8_layer_may_be_modified_in_place() -> None:
    layer = float8_linear()
    x = torch.randn(2, 3, 96, requires_grad=True)
    want = layer(x) + 1
    got = layer(x)
    got += 1
    assert torch.equal(got, want)
    got.sum().backward()
    assert layer(torch.zeros(2, 0, 96)).shape == (2, 0, 80)


def test_negative_expert_ids_are_off_rank() -> None:
    routing = route(torch.tensor([[0, -1], [3, 1]]), 3)
    assert routing.offsets_E.tolist() == [1, 2, 2]
