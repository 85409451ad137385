"""What octavo says where a family's experts cannot be FP8, and where they cannot run on its forward at all."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import octavo
from octavo.formats.weight import quantize
from octavo.integrations.experts import experts_layout
from octavo.nn.experts import OctavoExperts

from . import table
from .checkpoints import LAYOUTS, RECIPE, save_quantized
from .discovery import config_class
from .tiny import HIDDEN, built, class_called, tiny_config, tiny_model

# who quantizes experts one by one writes them so
_PROJECTIONS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}


def muse_spark() -> PreTrainedModel:
    """The one class whose experts normalise their output; its encoders are as small as they get."""
    text = tiny_config(config_class(class_called("MuseSparkExperts")))
    audio = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "out_hidden_size": HIDDEN}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes = {"out_hidden_size": 16, "projector_hidden_size": 16}
    config = transformers.MuseSparkConfig(text_config=text.to_dict(), audio_config=audio, vision_config=vision, **sizes)
    return built(transformers.MuseSparkForConditionalGeneration, config)


def single_experts(model: PreTrainedModel, folder: Path) -> Path:
    """``model`` as a checkpoint with FP8 matrices for each expert, whatever transformers would write."""
    folder = save_quantized(model, folder, "ct-channel").folder
    tensors = {key: tensor for key, tensor in load_file(folder / "model.safetensors").items() if "experts" not in key}
    for name, module in model.named_modules():
        if experts_layout(module) is None:
            continue
        for projection, stack in _PROJECTIONS.items():
            for expert, matrix in enumerate(module.get_parameter(stack)):
                tensors |= float8(f"{name}.{expert}.{projection}", one_projection(matrix, projection, module))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_projection(matrix: Tensor, projection: str, module: Any) -> Tensor:
    """[out, in] of one expert's gate, up or down."""
    matrix = matrix.T if module.is_transposed else matrix
    if projection == "down_proj":
        return matrix
    gate, up = matrix.chunk(2) if module.is_concatenated else (matrix[::2], matrix[1::2])
    return gate if projection == "gate_proj" else up


def float8(module: str, weight: Tensor) -> dict[str, Tensor]:
    found = quantize(weight.detach(), RECIPE["ct-channel"].layout)
    return {
        f"{module}.weight": found.codes[0, 0].contiguous(),
        f"{module}.weight_scale": found.scales[0, 0].contiguous(),
    }


@pytest.mark.parametrize("name", ["GptOssExperts", "AriaExperts"])
def test_fp8_experts_of_a_transposed_class(name: str, tmp_path: Path) -> None:
    folder = single_experts(tiny_model(class_called(name)), tmp_path / "model")
    with pytest.raises(octavo.CheckpointError) as caught:
        octavo.load_model(folder)
    assert name in str(caught.value)
    assert table.PLAIN_ONLY[name] in str(caught.value)


def test_fp8_experts_of_a_class_with_a_norm_behind_each(tmp_path: Path) -> None:
    class_called("MuseSparkExperts")
    model = muse_spark()
    folder = single_experts(model, tmp_path / "model")
    with octavo.enabled(), pytest.raises(octavo.CheckpointError) as caught:
        type(model).from_pretrained(folder, dtype=torch.float32)
    assert "MuseSparkExperts" in str(caught.value)
    assert table.NOT_OURS["MuseSparkExperts"] in str(caught.value)


@pytest.mark.parametrize("name", ["GraniteMoeExperts", "ZayaExperts"])
def test_fp8_experts_that_transformers_only_reads_stacked(name: str, tmp_path: Path) -> None:
    folder = single_experts(tiny_model(class_called(name)), tmp_path / "model")
    with pytest.raises(octavo.CheckpointError, match=rf"{name}.*no conversion that stacks its experts"):
        octavo.load_model(folder)


@pytest.mark.parametrize("name", ["GptOssExperts", "HYV4Experts"])
def test_fp8_stacks(name: str, tmp_path: Path) -> None:
    folder = save_quantized(tiny_model(class_called(name)), tmp_path / "model", "ct-channel").folder
    tensors = load_file(folder / "model.safetensors")
    key = next(key for key in tensors if key.endswith("experts.down_proj"))
    tensors[key] = tensors[key].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(octavo.CheckpointError, match=r"experts\.down_proj.*expected two dimensions"):
        octavo.load_model(folder)


def test_fp8_experts_of_a_class_without_the_decorator(tmp_path: Path) -> None:
    """transformers stacks LongCat's single experts, and nothing declares how the class reads the stacks."""
    assert "LongcatFlashExperts" in table.UNDECORATED
    sizes = {"num_layers": 1, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 40, "zero_expert_num": 0}
    model = built(transformers.LongcatFlashForCausalLM, tiny_config(transformers.LongcatFlashConfig, **sizes))
    saved = save_quantized(model, tmp_path, "ct-channel")
    tensors = load_file(saved.folder / "model.safetensors")
    for key in [key for key in tensors if ".experts." in key and key.endswith("_proj.weight")]:
        tensors |= float8(key.removesuffix(".weight"), tensors[key])
    save_file(tensors, saved.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(octavo.CheckpointError, match="LongcatFlashExperts, which octavo has no FP8 storage for"):
        octavo.load_model(saved.folder)


def test_plain_experts_that_are_not_ours_stay_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest of the checkpoint is FP8, the experts are not: the class computes them itself."""
    class_called("MuseSparkExperts")
    model = muse_spark()
    saved = save_quantized(model, tmp_path / "model", LAYOUTS[0], experts=False)
    with caplog.at_level(logging.WARNING, "octavo"), octavo.enabled():
        ours = type(model).from_pretrained(saved.folder, dtype=torch.float32)
    assert not any(isinstance(module, OctavoExperts) for module in ours.modules())
    warnings = [record.getMessage() for record in caplog.records if "own forward" in record.getMessage()]
    assert len(warnings) == sum(type(module) is class_called("MuseSparkExperts") for module in model.modules()) > 0
    assert all(table.NOT_OURS["MuseSparkExperts"] in warning for warning in warnings)
    token_ids = torch.arange(1, 11)[None]
    stock = type(model).from_pretrained(saved.plain, dtype=torch.float32)
    with torch.no_grad():
        want, got = stock(token_ids).logits, ours(token_ids).logits
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_a_model_type_without_a_causal_language_model(tmp_path: Path) -> None:
    """transformers knows Mistral 4's class and its auto class for causal language models does not."""
    model = built(transformers.Mistral4ForCausalLM, tiny_config(config_class(class_called("Mistral4Experts"))))
    model.save_pretrained(tmp_path)
    with pytest.raises(octavo.CheckpointError, match=r"mistral4.*AutoModelForCausalLM.*octavo\.enabled"):
        octavo.load_model(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_activations_in_the_dtype_of_the_codes(tmp_path: Path) -> None:
    """``x.to(layer.weight.dtype)`` in a model's code would round activations to bytes."""
    saved = save_quantized(tiny_model(class_called("Qwen3MoeExperts")), tmp_path / "model", "fp8-block")
    layer = octavo.load_model(saved.folder).model.layers[0].self_attn.q_proj
    with pytest.raises(octavo.OctavoError, match=r"got torch\.uint8 activations"):
        layer(torch.ones(1, HIDDEN).to(layer.weight.dtype))
