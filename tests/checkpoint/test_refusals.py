"""Everything that is wrong with a checkpoint is refused, and the message says what a person needs.

Each case damages a copy of a good checkpoint, which loads before and not after.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from octavo.checkpoint.accounting import open_ledger
from octavo.errors import CheckpointError
from tests.checkpoints import (
    Built,
    copy_of,
    edit_config,
    edit_header,
    edit_index,
    edit_tensors,
    read_json,
    truncate,
    write_json,
)

Get = Callable[..., Built]
GATE = "model.layers.2.mlp.experts.3.gate_proj"
ATTENTION = "model.layers.0.self_attn.q_proj"
INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"


def drop(*keys):
    return lambda folder: edit_tensors(folder, lambda tensors: [tensors.pop(key) for key in keys])


def put(key, tensor):
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.update({key: tensor}))


def recast(key, dtype):
    return lambda folder: edit_tensors(folder, lambda t: t.update({key: t[key].float().to(dtype)}))


def rename(old, new):
    return lambda folder: edit_tensors(folder, lambda t: t.update({new: t.pop(old)}))


def reshape(key, *shape):
    return lambda folder: edit_tensors(folder, lambda t: t.update({key: t[key].reshape(shape)}))


def relabel(key, dtype):
    """Another dtype name over the same bytes: those that torch cannot write."""
    return lambda folder: edit_header(folder, lambda header: header[key].update(dtype=dtype))


def configure(**fields):
    return lambda folder: edit_config(folder, lambda config: config.update(fields))


def ignore(*modules):
    return lambda folder: edit_config(folder, lambda config: config["ignore"].extend(modules))


def both(*damages):
    return lambda folder: [damage(folder) for damage in damages]


def unquantize(module):
    """bf16 in place of codes and scale."""
    return both(recast(f"{module}.weight", torch.bfloat16), drop(f"{module}.weight_scale"))


def stack_experts(tensors):
    """Layer 1 as one tensor of codes, as some models are published."""
    keys = [f"model.layers.1.mlp.experts.{e}.down_proj" for e in range(6)]
    codes = torch.stack([tensors.pop(f"{key}.weight").view(torch.uint8) for key in keys]).view(torch.float8_e4m3fn)
    tensors["model.layers.1.mlp.experts.down_proj"] = codes
    tensors["model.layers.1.mlp.experts.down_proj_scale"] = torch.stack(
        [tensors.pop(f"{k}.weight_scale") for k in keys]
    )


ONE_FILE = {
    # A weight and its scale.
    "missing scale": (drop(f"{GATE}.weight_scale"), [ONE, f"'{GATE}.weight'", f"expected '{GATE}.weight_scale'"]),
    "missing scales": (
        drop(f"{GATE}.weight_scale", f"{ATTENTION}.weight_scale"),
        ["2 FP8 weights have no scale; first", ATTENTION],
    ),
    "missing weight": (
        drop(f"{ATTENTION}.weight"),
        [ONE, f"'{ATTENTION}.weight_scale'", f"'{ATTENTION}.weight' is in no file"],
    ),
    "orphaned scale": (
        put("model.layers.7.mlp.up_proj.weight_scale", torch.ones(4, 1)),
        [ONE, "'model.layers.7.mlp.up_proj.weight_scale'", "and 'model.layers.7.mlp.up_proj.weight' is in no file"],
    ),
    "scale of a bf16 weight": (
        put("lm_head.weight_scale", torch.ones(256, 1)),
        ["'lm_head.weight' as BF16 with a scale, expected F8_E4M3"],
    ),
    "misshapen scale": (
        put(f"{ATTENTION}.weight_scale", torch.ones(96, 1)),
        [ONE, f"'{ATTENTION}.weight_scale' [96, 1]", "expected [192, 1] or [192]", "weight [192, 192]"],
    ),
    "scale of another layout": (put(f"{ATTENTION}.weight_scale", torch.ones(2, 2)), ["[2, 2]", "expected [192, 1]"]),
    "transposed scale": (put(f"{ATTENTION}.weight_scale", torch.ones(1, 192)), ["[1, 192]", "expected [192, 1]"]),
    "three-dimensional scale": (
        put(f"{ATTENTION}.weight_scale", torch.ones(192, 1, 1)),
        ["[192, 1, 1]", "expected [192, 1]"],
    ),
    "integer scale": (
        put(f"{ATTENTION}.weight_scale", torch.ones(192, 1, dtype=torch.int32)),
        ["as I32, expected F32 or BF16 or F16 or F8_E8M0"],
    ),
    "byte scale": (
        put(f"{ATTENTION}.weight_scale", torch.ones(192, 1, dtype=torch.uint8)),
        ["as U8, expected F32"],
    ),
    "name of another format": (
        rename(f"{ATTENTION}.weight_scale", f"{ATTENTION}.weight_scale_inv"),
        [
            f"expected '{ATTENTION}.weight_scale' beside it",
            "Also: tensors of a quantization that the config does not declare (1).",
        ],
    ),
    "zero point": (put(f"{ATTENTION}.weight_zero_point", torch.zeros(192, 1)), ["weight_zero_point", "does not use"]),
    "undeclared activation scale": (
        put(f"{ATTENTION}.input_scale", torch.ones(1)),
        [f"'{ATTENTION}.input_scale'", "does not use"],
    ),
    "packed weight": (
        put("model.layers.0.mlp.up_proj.weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
        ["weight_packed", "does not use"],
    ),
    # Dtypes.
    "bf16 with a scale": (
        recast(f"{ATTENTION}.weight", torch.bfloat16),
        [f"'{ATTENTION}.weight' as BF16 with a scale, expected F8_E4M3"],
    ),
    "e5m2": (recast(f"{ATTENTION}.weight", torch.float8_e5m2), ["as F8_E5M2, expected F8_E4M3"]),
    "e4m3fnuz": (relabel(f"{ATTENTION}.weight", "F8_E4M3FNUZ"), ["as F8_E4M3FNUZ, expected F8_E4M3"]),
    "e5m2fnuz": (relabel(f"{ATTENTION}.weight", "F8_E5M2FNUZ"), ["as F8_E5M2FNUZ, expected F8_E4M3"]),
    "int8": (relabel(f"{ATTENTION}.weight", "I8"), ["as I8 with a scale, expected F8_E4M3"]),
    "bytes": (relabel(f"{GATE}.weight", "U8"), ["as U8 with a scale"]),
    # What the config says.
    "codes where the config says unquantized": (
        ignore("re:.*self_attn.*"),
        ["12 FP8 weights are in layers that the config leaves unquantized", "ignored: 're:.*self_attn.*'"],
    ),
    "no group targets it": (
        lambda folder: edit_config(folder, lambda c: c["config_groups"]["group_0"].update(targets=["re:.*experts.*"])),
        ["FP8 weights are in layers that the config leaves unquantized", "no group of the config targets it"],
    ),
    "no quantization_config": (
        lambda folder: write_json(
            folder / "config.json",
            {k: v for k, v in read_json(folder / "config.json").items() if k != "quantization_config"},
        ),
        ["F8_E4M3, and config.json has no quantization_config"],
    ),
    "unknown method": (configure(quant_method="awq"), ["quant_method is 'awq'"]),
    "unknown strategy": (
        lambda f: edit_config(
            f, lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="group", group_size=64)
        ),
        ["strategy 'group'"],
    ),
    "unknown width": (
        lambda f: edit_config(f, lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=6)),
        ["num_bits 6"],
    ),
    # Experts.
    "one expert in bf16": (
        both(*(unquantize(GATE.replace("gate", p)) for p in ("gate", "up", "down"))),
        ["model.layers.2.mlp.experts: 15 of 18 expert weights are F8_E4M3", "experts.3.", "as BF16"],
    ),
    "one projection in bf16": (unquantize(GATE), ["17 of 18 expert weights", f"'{GATE}.weight' as BF16"]),
    "one expert in bf16 as the config says": (
        both(unquantize(GATE), ignore(GATE)),
        ["17 of 18 expert weights", f"(config: ignored: '{GATE}')", "quantize all of them, with one layout, or none"],
    ),
    "a projection in bf16 for every expert": (
        both(
            *(unquantize(f"model.layers.2.mlp.experts.{e}.down_proj") for e in range(6)),
            ignore("re:.*layers.2.*down_proj"),
        ),
        ["12 of 18 expert weights", "re:.*layers.2.*down_proj"],
    ),
    "a bf16 bank that the config declares FP8": (
        both(
            *(unquantize(f"model.layers.2.mlp.experts.{e}.{p}_proj") for e in range(6) for p in ("gate", "up", "down"))
        ),
        [
            "18 weights have another dtype than the config declares",
            "as BF16, expected F8_E4M3 (channel FP8 by group_0)",
        ],
    ),
    "a gap between experts": (
        drop(
            *(
                f"model.layers.1.mlp.experts.2.{p}_proj.{s}"
                for p in ("gate", "up", "down")
                for s in ("weight", "weight_scale")
            )
        ),
        ["model.layers.1.mlp.experts has 5 experts, numbered to 5, expected 6; expert 2 is in no file"],
    ),
    "the last expert": (
        drop(
            *(
                f"model.layers.1.mlp.experts.5.{p}_proj.{s}"
                for p in ("gate", "up", "down")
                for s in ("weight", "weight_scale")
            )
        ),
        ["model.layers.1.mlp.experts has 5 experts, numbered to 4, expected 6; expert 5 is in no file"],
    ),
    "a projection of one expert": (
        drop("model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.1.mlp.experts.4.up_proj.weight_scale"),
        ["model.layers.1.mlp.experts.4.up_proj.weight is in no file, the other experts have it"],
    ),
    "an expert of another size": (
        both(
            put(f"{GATE}.weight", torch.zeros(80, 192).to(torch.float8_e4m3fn)),
            put(f"{GATE}.weight_scale", torch.ones(80, 1)),
        ),
        [f"'{GATE}.weight' [80, 192]", "is [160, 192]"],
    ),
    "one layout for some experts": (
        both(
            lambda folder: edit_config(
                folder,
                lambda c: c["config_groups"].update(
                    group_1={
                        **c["config_groups"]["group_0"],
                        "targets": [GATE],
                        "weights": {**c["config_groups"]["group_0"]["weights"], "strategy": "tensor"},
                    }
                ),
            ),
            put(f"{GATE}.weight_scale", torch.ones(1)),
        ),
        [f"'{GATE}.weight' [160, 192] in layout tensor", "in layout channel"],
    ),
    "gate and up in two layouts": (
        both(
            lambda folder: edit_config(
                folder,
                lambda c: c["config_groups"].update(
                    group_1={
                        **c["config_groups"]["group_0"],
                        "targets": ["re:.*layers.2.*experts.*up_proj"],
                        "weights": {**c["config_groups"]["group_0"]["weights"], "strategy": "tensor"},
                    }
                ),
            ),
            *(put(f"model.layers.2.mlp.experts.{e}.up_proj.weight_scale", torch.ones(1)) for e in range(6)),
        ),
        ["model.layers.2.mlp.experts: gate_proj has layout channel and up_proj has tensor, which are fused"],
    ),
    "experts in one tensor": (
        lambda folder: edit_tensors(folder, stack_experts),
        [
            "'model.layers.1.mlp.experts.down_proj' as F8_E4M3, of shape [6, 192, 160]",
            "one FP8 matrix per expert and projection",
        ],
    ),
    "three-dimensional codes": (
        both(
            put("model.layers.1.mlp.experts.stack.weight", torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)),
            put("model.layers.1.mlp.experts.stack.weight_scale", torch.ones(2, 4, 1)),
        ),
        ["'model.layers.1.mlp.experts.stack.weight' as F8_E4M3, of shape [2, 4, 4], expected two dimensions"],
    ),
    # Files.
    "cut off": (lambda folder: truncate(folder / ONE, 100), [ONE, "is cut off"]),
    "lying header": (
        lambda folder: edit_header(folder, lambda header: header[f"{GATE}.weight"].update(shape=[160, 193])),
        [ONE, f"'{GATE}.weight' is F8_E4M3 of shape [160, 193]"],
    ),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json is not JSON"]),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json is a JSON list"]),
    "config is binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\x00"), ["config.json is not JSON"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["has no config.json"]),
    "no weights": (lambda folder: (folder / ONE).unlink(), ["has no weights: expected model.safetensors"]),
    "only pickle": (
        lambda folder: (folder / ONE).rename(folder / "pytorch_model.bin"),
        ["only as pickle files, first 'pytorch_model.bin'", "save_pretrained"],
    ),
    "only pickle pt": (
        lambda folder: (folder / ONE).rename(folder / "model.pt"),
        ["only as pickle files, first 'model.pt'"],
    ),
    "a shard without an index": (
        lambda folder: (folder / ONE).rename(folder / "model-00001-of-00002.safetensors"),
        ["neither model.safetensors nor model.safetensors.index.json", "'model-00001-of-00002.safetensors'"],
    ),
    "empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], ["is empty"]),
}


@pytest.mark.parametrize("name", ONE_FILE)
def test_one_file(built: Get, tmp_path, name):
    damage, words = ONE_FILE[name]
    refused(copy_of(built(arch="qwen", layout="ct-channel"), tmp_path / "x"), damage, words)


def refused(folder: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    open_ledger(folder)
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        open_ledger(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    # One paragraph that ends like a sentence.
    assert "\n" not in message
    assert message.endswith((".", "'", "org/model")), message


SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def reindex(change):
    return lambda folder: edit_index(folder, change)


def swap(weight_map):
    key = f"{GATE}.weight"
    weight_map[key] = next(name for name in SHARDS if name != weight_map[key])


def copy_into_another(folder):
    index = read_json(folder / INDEX)["weight_map"]
    key = f"{GATE}.weight"
    other = next(name for name in SHARDS if name != index[key])
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.zeros(160, 192).to(torch.float8_e4m3fn)}), other)


def escape(name):
    return reindex(lambda weight_map: weight_map.update({f"{GATE}.weight": name}))


SHUFFLED = {
    "absent shard": (
        lambda folder: (folder / SHARDS[1]).unlink(),
        [f"lists '{SHARDS[1]}', which is not in", "tensors are in it"],
    ),
    "shard above the folder": (escape("../x.safetensors"), ["lists '../x.safetensors', which lies outside"]),
    "shard above the folder, in two steps": (escape("a/../../x.safetensors"), ["lies outside"]),
    "absolute shard": (escape("/etc/passwd"), ["lists '/etc/passwd', which lies outside"]),
    "absolute shard of Windows": (escape("C:\\x.safetensors"), ["lies outside"]),
    "shard above a Windows folder": (escape("..\\x.safetensors"), ["lies outside"]),
    "wrong shard": (reindex(swap), [f"'{GATE}.weight' is listed in model-0000", "and is in model-0000"]),
    "not listed": (
        reindex(lambda weight_map: weight_map.pop(f"{GATE}.weight")),
        [f"has '{GATE}.weight', which {INDEX} does not list"],
    ),
    "in no file": (
        reindex(lambda weight_map: weight_map.update(gone=SHARDS[0])),
        [f"'gone' is listed in {SHARDS[0]} and is in no file"],
    ),
    "in two files": (copy_into_another, [f"'{GATE}.weight' is in model-0000", "and in model-0000"]),
    "stray shard": (
        lambda folder: (folder / "model-00004-of-00004.safetensors").write_bytes(b""),
        ["model-00004-of-00004.safetensors is in the folder", "lists no tensor of it"],
    ),
    "index is not JSON": (lambda folder: (folder / INDEX).write_text("{"), [f"{INDEX} is not JSON"]),
    "index is a list": (lambda folder: write_json(folder / INDEX, []), [f"{INDEX} is a JSON list"]),
    "index without a map": (
        lambda folder: write_json(folder / INDEX, {"metadata": {}}),
        [f"{INDEX} has no weight_map"],
    ),
    "index with an empty map": (lambda folder: write_json(folder / INDEX, {"weight_map": {}}), ["has no weight_map"]),
    "index with numbers": (lambda folder: write_json(folder / INDEX, {"weight_map": {"a": 1}}), ["has no weight_map"]),
    "cut off": (lambda folder: truncate(folder / SHARDS[2], 1), [SHARDS[2], "is cut off"]),
    "empty shard": (lambda folder: (folder / SHARDS[2]).write_bytes(b""), [SHARDS[2], "has 0 bytes"]),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_shards(built: Get, tmp_path, name):
    damage, words = SHUFFLED[name]
    refused(copy_of(built(arch="qwen", layout="ct-channel", files="shuffled"), tmp_path / "x"), damage, words)


KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa"
OTHER_LAYOUTS = {
    "blocks rounded down": (
        "fp8-block",
        put(f"{KV_A}.weight_scale_inv", torch.ones(4, 1)),
        [f"'{KV_A}.weight_scale_inv' [4, 1]", "expected [5, 2] for a weight [576, 192]"],
    ),
    "blocks of another size": (
        "fp8-block",
        configure(weight_block_size=[64, 64]),
        ["scales do not have the shape of the declared layout", "block 64x64 FP8 by fp8"],
    ),
    "one scale where blocks are declared": (
        "fp8-tensor",
        configure(weight_block_size=[128, 128]),
        ["scales do not have the shape", " []"],
    ),
    "blocks where one scale is declared": (
        "fp8-block",
        configure(weight_block_size=None),
        ["scales do not have the shape", "expected [] or [1] or [1, 1]"],
    ),
    "one scale for each expert in a stack": (
        "fp8-tensor",
        put(f"{KV_A}.weight_scale_inv", torch.ones(2)),
        [f"'{KV_A}.weight_scale_inv' [2]", "expected [] or [1] or [1, 1]"],
    ),
    "missing activation scale": (
        "fp8-tensor",
        drop(f"{KV_A}.activation_scale"),
        [f"'{KV_A}' has static activations", f"expected '{KV_A}.activation_scale'"],
    ),
    "misshapen activation scale": (
        "modelopt",
        put(f"{KV_A}.input_scale", torch.ones(576)),
        [f"'{KV_A}.input_scale' [576], expected one value"],
    ),
    "orphaned activation scale": (
        "modelopt",
        put("model.layers.9.input_scale", torch.ones(1)),
        ["'model.layers.9.input_scale' as F32, and 'model.layers.9.weight' is in no file"],
    ),
    "activation scales of a dynamic checkpoint": (
        "fp8-tensor",
        configure(activation_scheme="dynamic"),
        ["tensors of a quantization that the config does not declare", "activation_scale"],
    ),
    "bytes where float scales are declared": (
        "fp8-block",
        recast(f"{KV_A}.weight_scale_inv", torch.uint8),
        ["as U8, expected F32"],
    ),
    "two scales of one weight": (
        "fp8-block",
        put(f"{KV_A}.scale", torch.ones(5, 2)),
        [f"'{KV_A}' has two scales"],
    ),
    "an experts list that speaks of other layers": (
        "fp8-block",
        configure(modules_to_not_convert=["model.layers.1.mlp.experts"]),
        ["FP8 weights are in layers that the config leaves unquantized", "ignored: 'model.layers.1.mlp.experts'"],
    ),
}


@pytest.mark.parametrize("name", OTHER_LAYOUTS)
def test_other_layouts(built: Get, tmp_path, name):
    layout, damage, words = OTHER_LAYOUTS[name]
    refused(copy_of(built(arch="glm", layout=layout), tmp_path / "x"), damage, words)


class TestUnquantized:
    """Damage is refused there as well, and FP8 without a config that explains it."""

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda folder: (folder / SHARDS[1]).unlink(), ["which is not in"]),
            (lambda folder: truncate(folder / SHARDS[1], 5), ["is cut off"]),
            (lambda folder: (folder / INDEX).write_text("no"), ["is not JSON"]),
            (escape("../x.safetensors"), ["lies outside"]),
        ],
    )
    def test_damage(self, built: Get, tmp_path, damage, words):
        refused(copy_of(built(arch="qwen", layout="bf16", files="shuffled"), tmp_path / "x"), damage, words)

    def test_codes(self, built: Get, tmp_path):
        folder = copy_of(built(arch="qwen", layout="bf16"), tmp_path / "x")
        refused(
            folder,
            recast(f"{GATE}.weight", torch.float8_e4m3fn),
            [f"'{GATE}.weight' as F8_E4M3", "no quantization_config"],
        )


def test_other_sources(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        open_ledger(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no files were given"):
        open_ledger([])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a safetensors file"):
        open_ledger([tmp_path / "pytorch_model.bin"])


def test_several_kinds_at_once_are_counted(built: Get, tmp_path):
    folder = copy_of(built(arch="qwen", layout="ct-channel"), tmp_path / "x")
    both(
        drop(f"{GATE}.weight_scale"),
        put("model.layers.7.mlp.up_proj.weight_scale", torch.ones(4, 1)),
        put("model.layers.8.mlp.up_proj.weight_scale", torch.ones(4, 1)),
    )(folder)
    with pytest.raises(
        CheckpointError, match=r"experts\.3\.gate_proj\.weight.* Also: scales belong to no FP8 weight \(2\)\."
    ):
        open_ledger(folder)
