"""From config.json to a scheme, in every family, and what is refused by name."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest

from octavo.errors import CheckpointError
from octavo.formats.modelopt import from_hf_quant_config
from octavo.formats.scheme import ScaleLayout, is_fp8, parse_scheme, quantization_config

EIGHT = {"num_bits": 8, "type": "float", "symmetric": True}
BLOCK_128 = ScaleLayout("block", (128, 128))


def compressed(weights=None, activations=None, *, group=None, **config):
    """A compressed-tensors config with one group."""
    weights = {**EIGHT, "strategy": "channel", "dynamic": False, **(weights or {})}
    found = {"targets": ["Linear"], "weights": weights, "input_activations": activations, **(group or {})}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": found},
        "ignore": ["lm_head"],
        **config,
    }


def fp8(**config):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], **config}


def scheme_of(raw):
    return parse_scheme({"model_type": "qwen3_moe", "quantization_config": raw})


@pytest.mark.parametrize(
    ("raw", "layout", "activation", "suffixes", "scale_format"),
    [
        (fp8(), BLOCK_128, "dynamic-group", ("weight_scale_inv", None), "float"),
        (fp8(weight_block_size=[64, 32]), ScaleLayout("block", (64, 32)), "dynamic-group", None, "float"),
        (fp8(weight_block_size=None), ScaleLayout("tensor"), "dynamic-token", None, "float"),
        (fp8(scale_fmt="ue8m0", fmt="e4m3"), BLOCK_128, "dynamic-group", None, "ue8m0"),
        (fp8(scale_fmt=None), BLOCK_128, "dynamic-group", None, "float"),
        (
            fp8(weight_block_size=None, activation_scheme="static"),
            ScaleLayout("tensor"),
            "static-tensor",
            ("weight_scale_inv", "activation_scale"),
            "float",
        ),
        (
            compressed(activations={**EIGHT, "strategy": "token", "dynamic": True}),
            ScaleLayout("channel"),
            "dynamic-token",
            ("weight_scale", None),
            "float",
        ),
        (
            compressed({"strategy": "tensor"}, {**EIGHT, "strategy": "tensor", "dynamic": False}),
            ScaleLayout("tensor"),
            "static-tensor",
            ("weight_scale", "input_scale"),
            "float",
        ),
        (
            compressed(
                {"strategy": "block", "block_structure": [128, 128]},
                {**EIGHT, "strategy": "group", "group_size": 128, "dynamic": True},
            ),
            BLOCK_128,
            "dynamic-group",
            None,
            "float",
        ),
        # What the format lets a writer leave out, and how older ones spelled it.
        (compressed({"strategy": "block", "block_structure": "128x128"}), BLOCK_128, "none", None, "float"),
        (compressed({"strategy": None, "group_size": None}), ScaleLayout("tensor"), "none", None, "float"),
        (compressed({"strategy": None, "group_size": -1}), ScaleLayout("channel"), "none", None, "float"),
        (compressed({"type": "FLOAT", "strategy": "CHANNEL"}), ScaleLayout("channel"), "none", None, "float"),
        (compressed(format="naive-quantized"), ScaleLayout("channel"), "none", None, "float"),
        (
            compressed(format="mixed-precision", group={"format": "float-quantized"}),
            ScaleLayout("channel"),
            "none",
            None,
            "float",
        ),
        (compressed(sparsity_config={"format": "dense"}), ScaleLayout("channel"), "none", None, "float"),
        (
            compressed(activations={**EIGHT, "strategy": "tensor", "dynamic": True}),
            None,
            "dynamic-tensor",
            None,
            "float",
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
            ScaleLayout("tensor"),
            "static-tensor",
            ("weight_scale", "input_scale"),
            "float",
        ),
        ({"quant_method": "fbgemm_fp8"}, ScaleLayout("channel"), "dynamic-token", ("weight_scale", None), "float"),
    ],
)
def test_what_a_config_says(raw, layout, activation, suffixes, scale_format):
    untouched = copy.deepcopy(raw)
    assert is_fp8(raw)
    scheme = scheme_of(raw)
    module = "model.layers.1.mlp.experts.0.gate_proj"
    if layout is not None:
        assert scheme.layout_of(module) == layout
    assert scheme.activation == activation == scheme.activation_of(module)
    assert scheme.scale_format == scale_format
    assert scheme.method == raw["quant_method"]
    assert scheme.raw == untouched == raw
    if suffixes is not None:
        assert (scheme.scale_suffix, scheme.activation_suffix) == suffixes
    # Every family here leaves the head alone, by its list or by its default.
    assert scheme.layout_of("lm_head") is None
    assert scheme.why("lm_head") == "ignored: 'lm_head'"


def test_a_config_of_a_multimodal_model():
    assert parse_scheme({"text_config": {"quantization_config": fp8()}}).method == "fp8"


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"num_experts": 4}}])
def test_unquantized(config):
    assert parse_scheme(config) is None
    assert quantization_config(config) is None


@pytest.mark.parametrize("name", ["modules_to_not_convert", "ignored_layers"])
def test_skip_lists_of_fp8(name):
    scheme = scheme_of(fp8(**{name: ["model.layers.1.mlp.experts.0.gate_proj", "mlp.gate", "model.layers.2"]}))
    assert scheme.layout_of("model.layers.1.mlp.experts.0.gate_proj") is None
    assert scheme.layout_of("model.layers.1.mlp.experts.1.gate_proj") == BLOCK_128
    assert scheme.layout_of("model.layers.2.mlp.experts.1.gate_proj") is None
    assert scheme.layout_of("model.layers.20.mlp.experts.1.gate_proj") == BLOCK_128
    assert scheme.layout_of("model.layers.3.mlp.gate") is None
    # A list that is there is the whole list.
    assert scheme.layout_of("lm_head") == BLOCK_128
    assert scheme.why("model.layers.2.self_attn.q_proj") == "ignored: 'model.layers.2'"
    assert scheme.why("model.layers.3.self_attn.q_proj") == "block 128x128 FP8 by fp8"


def test_a_skip_list_may_be_null():
    scheme = scheme_of(fp8(modules_to_not_convert=None))
    assert scheme.layout_of("lm_head") is None
    assert scheme.layout_of("model.layers.0.mlp.up_proj") == BLOCK_128


def test_several_groups_and_their_words():
    raw = compressed(activations={**EIGHT, "strategy": "token", "dynamic": True})
    raw["config_groups"]["group_1"] = {
        "targets": ["re:.*self_attn.*"],
        "weights": {**EIGHT, "strategy": "block", "block_structure": [64, 64]},
    }
    raw["config_groups"]["group_2"] = {"targets": ["model.layers.0.mlp.up_proj"], "weights": None}
    scheme = scheme_of(raw)
    assert scheme.why("model.layers.0.mlp.gate_proj") == "channel FP8 by group_0"
    assert scheme.why("model.layers.0.self_attn.q_proj") == "block 64x64 FP8 by group_1"
    assert scheme.why("model.layers.0.mlp.up_proj") == "weights left unquantized by group_2"
    assert scheme.activation == "mixed"
    assert scheme.activation_of("model.layers.0.mlp.gate_proj") == "dynamic-token"
    assert scheme.activation_of("model.layers.0.self_attn.q_proj") == "none"


def test_a_module_that_no_group_targets():
    scheme = scheme_of(compressed(group={"targets": ["re:.*experts.*"]}))
    assert scheme.layout_of("model.layers.0.self_attn.q_proj") is None
    assert scheme.why("model.layers.0.self_attn.q_proj") == "no group of the config targets it"


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        (compressed(kv_cache_scheme={"num_bits": 8}), {"k_scale", "v_scale"}),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, {"k_scale", "v_scale"}),
        ({"quant_method": "fbgemm_fp8"}, {"input_scale_ub"}),
    ],
)
def test_what_the_config_explains_is_ignored_with_a_reason(raw, names):
    assert names <= scheme_of(raw).ignored_suffixes.keys()
    assert all(scheme_of(raw).ignored_suffixes.values())


def test_nothing_is_ignored_without_a_reason_in_the_config():
    assert scheme_of(compressed()).ignored_suffixes == {}


def test_modelopts_older_file():
    beside = {"producer": {}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head", "*.mlp.gate"]}}
    scheme = scheme_of(from_hf_quant_config(beside))
    assert scheme.layout_of("model.layers.3.mlp.gate") is None
    assert scheme.layout_of("model.layers.3.mlp.gate_proj") == ScaleLayout("tensor")
    for wrong in ([], {}, {"quantization": 3}):
        with pytest.raises(CheckpointError, match="hf_quant_config"):
            from_hf_quant_config(wrong)


@pytest.mark.parametrize(
    ("raw", "names"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "mxfp8"}, "'mxfp8'"),
        ({"bits": 4}, "None"),
        (compressed({"strategy": "group", "group_size": 128}), "'group'.*128"),
        (compressed({"strategy": "tensor_group", "group_size": 16}), "'tensor_group'"),
        (compressed({"strategy": None, "group_size": 32}), "'group'.*32"),
        (compressed({"strategy": "block"}), "'block'.*block_structure None"),
        (compressed({"num_bits": 4}), "'float' with num_bits 4"),
        (compressed({"type": "int"}), "'int' with num_bits 8"),
        (compressed({"symmetric": False}), "asymmetric.*zero points"),
        (compressed(format="mxfp8-quantized"), "'mxfp8-quantized'"),
        (compressed(format="pack-quantized"), "'pack-quantized'"),
        (compressed(format="mixed-precision"), "'mixed-precision'"),
        (compressed(format=None), "format None"),
        (compressed(group={"targets": ["LlamaAttention"]}), "'LlamaAttention'"),
        (compressed(activations={"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}), "'int'"),
        (compressed(activations={**EIGHT, "strategy": "token", "dynamic": False}), "'token'.*False"),
        (compressed(activations={**EIGHT, "strategy": "tensor_group", "dynamic": "local"}), "'tensor_group'"),
        (compressed(transform_config={"config_groups": {}}), "transform_config"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "'sparse-24-bitmask'"),
        (compressed(config_groups=[]), r"config_groups .*\[\]"),
        (compressed(config_groups={"group_0": "FP8"}), "'FP8'"),
        (compressed(ignore="lm_head"), "ignore .*'lm_head'"),
        (compressed({"block_structure": [0, 128], "strategy": "block"}), r"block_structure .*\[0, 128\]"),
        (fp8(weight_block_size=[128]), r"weight_block_size .*\[128\]"),
        (fp8(weight_block_size=[True, 128]), "weight_block_size"),
        (fp8(activation_scheme="sometimes"), "'sometimes'"),
        (fp8(scale_fmt="e5m2"), "'e5m2'"),
        (fp8(fmt="e5m2"), "'e5m2'"),
        (fp8(expert_dtype="fp4"), "expert_dtype 'fp4'"),
        (fp8(modules_to_not_convert=[1]), r"modules_to_not_convert .*\[1\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'NVFP4'"),
        ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, "'FP8_PB_WO'"),
        ({"quant_method": "modelopt"}, "None"),
    ],
)
def test_refused_by_name(raw, names):
    with pytest.raises(CheckpointError, match=names):
        scheme_of(raw)


@pytest.mark.parametrize("found", [[], "fp8", 3])
def test_a_quantization_config_is_an_object(found):
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        parse_scheme({"quantization_config": found})


def test_a_mixture_of_fp8_and_int4_is_ours_to_refuse():
    raw = compressed()
    raw["config_groups"]["group_1"] = {"targets": ["re:.*down.*"], "weights": {"num_bits": 4, "type": "int"}}
    assert is_fp8(raw)
    with pytest.raises(CheckpointError, match=r"group_1.*num_bits 4"):
        scheme_of(raw)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors"},
        compressed({"type": "int"}),
        compressed({"num_bits": 4}, format="nvfp4-pack-quantized"),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {"quant_method": "modelopt", "quant_algo": "MXFP8"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
)
def test_what_is_not_ours(raw):
    assert not is_fp8(raw)


def test_no_torch_to_read_a_config():
    modules = "octavo.formats.scheme, octavo.checkpoint.accounting, octavo.checkpoint.survey"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
