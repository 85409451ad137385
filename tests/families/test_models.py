"""Every family as a whole model: quantized on disk, loaded by octavo, against stock transformers, dequantized.

Compared are logits and the gradient of the loss in the input embeddings, in float32, and every byte of what is saved
again. Tiny models take a fifth of a second each, so all of them run in CI, in one layout each; the others are ``slow``.
"""

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import octavo
from octavo.nn.experts import DenseExperts, Float8Experts
from octavo.nn.linear import Float8Linear
from tests.checkpoints import Layout, edit_tensors, read_json

from . import table
from .cases import assert_close
from .checkpoints import LAYOUTS, Saved, everything, save_quantized
from .discovery import config_class
from .tiny import VOCABULARY, built, class_called, tiny_config, tiny_model

# Sums of float32 in another order, through three layers: measured at most 3e-6.
TOLERANCE = 1e-5
# Causal language models whose experts a checkpoint can hold in FP8.
FLOAT8_ON_DISK = tuple(name for name in table.CAUSAL_LM if name in table.FLOAT8 and name not in table.STACKED_ON_DISK)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Float32 is meant here."""
    caplog.set_level(logging.ERROR, "octavo")


def layout_for(name: str) -> Layout:
    """The layouts take turns."""
    return LAYOUTS[table.CAUSAL_LM.index(name) % len(LAYOUTS)]


def loss_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    """The logits, and the gradient of the loss in what the embedding puts out."""
    token_ids = torch.randint(1, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    embedded: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    model.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(cut)
    logits = model(token_ids, use_cache=False).logits
    hook.remove()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()).backward()
    return {"logits": logits.detach(), "embeddings": embedded[0].grad}


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def assert_same_model(saved: Saved, ours: PreTrainedModel, stock: PreTrainedModel, again: Path) -> None:
    assert_close(loss_gradients(stock.eval()), loss_gradients(ours.eval()), TOLERANCE)
    ours.save_pretrained(again)
    written, read = everything(again), everything(saved.folder)
    assert written.keys() == read.keys()
    assert [key for key in read if written[key] != read[key]] == []
    assert quantization_of(again) == quantization_of(saved.folder)


def quantization_of(folder: Path) -> object:
    return read_json(folder / "config.json")["quantization_config"]


def check_family(name: str, layout: Layout, folder: Path, *, experts: bool = True) -> None:
    cls = class_called(name)
    saved = save_quantized(tiny_model(cls), folder / "model", layout, experts=experts)
    ours = octavo.load_model(saved.folder, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(saved.plain, dtype=torch.float32)

    num_experts_modules = count(stock, cls)
    in_float8 = experts and name in FLOAT8_ON_DISK
    assert bool(saved.experts) == in_float8
    assert count(ours, Float8Experts if in_float8 else DenseExperts) == num_experts_modules > 0
    dequantized = sum(module.endswith(table.DEQUANTIZED.get(name, ())) for module in saved.quantized)
    assert bool(dequantized) == (name in table.DEQUANTIZED)
    assert count(ours, Float8Linear) == len(saved.quantized) - len(saved.experts) - dequantized > 0
    assert_same_model(saved, ours, stock, folder / "again")


@pytest.mark.parametrize("name", table.CAUSAL_LM)
def test_model_in_fp8_is_the_dequantized_one(name: str, tmp_path: Path) -> None:
    check_family(name, layout_for(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", table.CAUSAL_LM)
def test_every_layout(name: str, layout: Layout, tmp_path: Path) -> None:
    check_family(name, layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOAT8_ON_DISK)
def test_plain_experts_beside_fp8_layers(name: str, tmp_path: Path) -> None:
    check_family(name, layout_for(name), tmp_path, experts=False)


@pytest.mark.parametrize("name", table.DEQUANTIZED)
def test_training_mode_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    """Some models hand the weight of a layer to a fused operation while they train, and only then."""
    saved = save_quantized(tiny_model(class_called(name)), tmp_path / "model", layout_for(name))
    ours = octavo.load_model(saved.folder, dtype=torch.float32).train()
    stock = AutoModelForCausalLM.from_pretrained(saved.plain, dtype=torch.float32).train()
    assert_close(loss_gradients(stock), loss_gradients(ours), TOLERANCE)


def test_layers_that_the_class_keeps_wide_need_no_mention_in_the_config(tmp_path: Path) -> None:
    """As DeepSeek publishes V3.2: the indexer's last layer is not FP8, and no list says so."""
    name = "DeepseekV32Experts"
    saved = save_quantized(tiny_model(class_called(name)), tmp_path / "model", "fp8-block")
    plain = load_file(saved.plain / "model.safetensors")
    kept = [module for module in saved.quantized if module.endswith(table.DEQUANTIZED[name])]
    assert kept

    def restore(tensors: dict[str, Tensor]) -> None:
        for module in kept:
            tensors[f"{module}.weight"] = plain[f"{module}.weight"]
            del tensors[f"{module}.weight_scale_inv"]

    edit_tensors(saved.folder, restore)
    ours = octavo.load_model(saved.folder, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(saved.plain, dtype=torch.float32)
    assert_same_model(saved, ours, stock, tmp_path / "again")


@pytest.mark.parametrize("name", table.CAUSAL_LM)
def test_plain_model_is_the_stock_one(name: str, tmp_path: Path) -> None:
    """An unquantized checkpoint: its experts run on octavo's forward, or on their own with ``engine="stock"``."""
    cls = class_called(name)
    tiny_model(cls).save_pretrained(tmp_path)
    want = loss_gradients(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval())
    ours = octavo.load_model(tmp_path, dtype=torch.float32)
    assert count(ours, DenseExperts) == count(ours, cls) > 0
    assert_close(want, loss_gradients(ours.eval()), TOLERANCE)
    assert count(octavo.load_model(tmp_path, dtype=torch.float32, engine="stock"), DenseExperts) == 0


def test_language_model_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    """``load_model`` reads the text part; the image encoder's tensors, FP8 too, are what the class leaves out."""
    cls = class_called("Qwen3_5MoeExperts")
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 72}
    config = transformers.Qwen3_5MoeConfig(text_config=tiny_config(config_class(cls)).to_dict(), vision_config=vision)
    whole = built(transformers.Qwen3_5MoeForConditionalGeneration, config)
    saved = save_quantized(whole, tmp_path / "model", "fp8-block")
    assert any("visual" in module for module in saved.quantized)
    ours = octavo.load_model(saved.folder, dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(saved.plain, dtype=torch.float32)
    assert type(ours) is type(stock) is MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert count(ours, Float8Experts) == 3
    assert_close(loss_gradients(stock.eval()), loss_gradients(ours.eval()), TOLERANCE)


def test_multimodal_model_inside_enabled(tmp_path: Path) -> None:
    cls = class_called("Glm4vMoeTextExperts")
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 3]}
    text = tiny_config(config_class(cls), rope_parameters=rope).to_dict()
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 72}
    config = transformers.Glm4vMoeConfig(text_config=text, vision_config=vision)
    model_class = transformers.Glm4vMoeForConditionalGeneration
    saved = save_quantized(built(model_class, config), tmp_path / "model", "fp8-block")
    with octavo.enabled():
        ours = model_class.from_pretrained(saved.folder, dtype=torch.float32)
    assert count(ours, Float8Experts) == 2
    stock = model_class.from_pretrained(saved.plain, dtype=torch.float32)
    assert_same_model(saved, ours, stock, tmp_path / "again")
    with pytest.raises(octavo.CheckpointError, match=r"glm4v_moe.*no causal language model.*octavo\.enabled"):
        octavo.load_model(saved.folder)


@pytest.mark.parametrize("experts", [False, True], ids=["plain-experts", "fp8-experts"])
def test_a_tensor_that_fills_two_parameters(experts: bool, tmp_path: Path) -> None:
    """ERNIE 4.5 VL: the experts of text and of images lie in one bank on disk, and transformers deals them out."""
    cls = class_called("Ernie4_5_VLMoeMoeExperts")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 10]}
    sizes = {"rope_parameters": rope, "moe_intermediate_size": [40, 40]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    text = tiny_config(config_class(cls), **sizes).to_dict()
    model_class = transformers.Ernie4_5_VLMoeForConditionalGeneration
    model = built(model_class, transformers.Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision))
    saved = save_quantized(model, tmp_path / "model", "fp8-block", experts=experts)
    with octavo.enabled():
        if experts:
            with pytest.raises(octavo.CheckpointError, match="rearranges it while loading"):
                model_class.from_pretrained(saved.folder, dtype=torch.float32)
            return
        ours = model_class.from_pretrained(saved.folder, dtype=torch.float32)
    assert count(ours, DenseExperts) == count(ours, cls) > 0
    assert_same_model(saved, ours, model_class.from_pretrained(saved.plain, dtype=torch.float32), tmp_path / "again")
