"""The sums that inspect shows: every byte once, equal layers as ranges, and the config's own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from octavo.checkpoint.accounting import open_ledger
from octavo.checkpoint.survey import Group, survey
from tests.checkpoints import FURTHER_LAYOUTS, LAYOUTS, Built, quantization_config, write_json

Get = Callable[..., Built]


def rows(groups: tuple[Group, ...]) -> list[tuple[str, str, str, int]]:
    return [(group.layers, group.part, group.storage, group.matrices) for group in groups]


@pytest.mark.parametrize("arch", ["glm", "qwen"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *FURTHER_LAYOUTS, "bf16"])
def test_kinds_sum_up_to_the_files(built: Get, arch, layout):
    ledger = open_ledger(built(arch=arch, layout=layout).folder)
    found = survey(ledger)
    assert found.total.tensors == len(ledger.entries)
    assert found.total.nbytes == sum(entry.nbytes for entry in ledger.entries.values())
    # Matrices are everything but vectors.
    vectors = sum(entry.nbytes for entry in ledger.plain.values() if len(entry.shape) < 2)
    assert sum(group.nbytes for group in found.groups) + vectors == found.total.nbytes
    codes = found.kinds.get("FP8 codes")
    assert (codes.tensors if codes else 0) == len(ledger.quantized)


def test_a_mixed_checkpoint(built: Get):
    found = survey(open_ledger(built(arch="glm", layout="ct-channel", mixed=True).folder))
    fp8 = "FP8 channel"
    assert rows(found.groups) == [
        ("", "embeddings", "BF16", 1),
        ("0", "attention", fp8, 5),
        ("1", "attention", "BF16", 5),
        ("2", "attention", fp8, 5),
        ("0", "dense MLP", fp8, 3),
        ("1", "shared experts", "BF16", 3),
        ("2", "shared experts", fp8, 3),
        ("1", "routed experts", "BF16", 18),
        ("2", "routed experts", fp8, 18),
        ("1-2", "router", "BF16", 2),
        ("", "output head", "BF16", 1),
    ]
    why = {(group.layers, group.part): group.why for group in found.groups}
    assert why["1", "routed experts"] == "ignored: 'model.layers.1.mlp.experts.0.down_proj' and 17 more"
    assert why["2", "routed experts"] == "channel FP8 by group_0"
    assert why["", "output head"] == "ignored: 'lm_head'"
    assert why["", "embeddings"] == "stored so; on no list of the config"


def test_a_checkpoint_that_is_all_alike(built: Get):
    found = survey(open_ledger(built(arch="qwen", layout="fp8-block").folder))
    assert ("1-2", "routed experts", "FP8 block 128x128", 36) in rows(found.groups)
    assert ("0-2", "attention", "FP8 block 128x128", 12) in rows(found.groups)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"quantization_config": quantization_config("ct-channel", [])})
    return folder


def test_ranges_stop_where_layers_differ(tmp_path):
    """3 is absent, 5 is larger, 7 is unquantized in part."""
    tensors = {}
    for layer in (0, 1, 2, 4, 5, 6, 7, 8):
        name = f"model.layers.{layer}.self_attn"
        rows_here = 32 if layer == 5 else 16
        tensors[f"{name}.q_proj.weight"] = torch.zeros(rows_here, 8).to(torch.float8_e4m3fn)
        tensors[f"{name}.q_proj.weight_scale"] = torch.ones(rows_here, 1)
        if layer == 7:
            tensors[f"{name}.k_proj.weight"] = torch.zeros(16, 8).bfloat16()
    found = survey(open_ledger(checkpoint(tmp_path / "x", tensors)))
    fp8 = "FP8 channel"
    assert rows(found.groups) == [
        ("0-2", "attention", fp8, 3),
        ("4", "attention", fp8, 1),
        ("5", "attention", fp8, 1),
        ("6", "attention", fp8, 1),
        ("7", "attention", fp8, 1),
        ("7", "attention", "BF16", 1),
        ("8", "attention", fp8, 1),
    ]


@pytest.mark.parametrize(
    ("key", "part", "layers"),
    [
        ("model.layers.3.mlp.experts.7.gate_proj.weight", "routed experts", "3"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", "routed experts", "3"),
        ("model.layers.3.mlp.experts.gate_up_proj", "routed experts", "3"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "shared experts", "3"),
        ("model.layers.3.mlp.shared_expert.up_proj.weight", "shared experts", "3"),
        ("model.layers.3.mlp.gate.weight", "router", "3"),
        ("model.layers.3.block_sparse_moe.gate.weight", "router", "3"),
        ("model.layers.3.mlp.gate_proj.weight", "dense MLP", "3"),
        ("model.layers.3.feed_forward.w1.weight", "dense MLP", "3"),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", "attention", "3"),
        ("model.layers.3.linear_attn.in_proj_qkvz.weight", "attention", "3"),
        ("model.layers.61.eh_proj.weight", "other", "61"),
        ("model.embed_tokens.weight", "embeddings", ""),
        ("lm_head.weight", "output head", ""),
        ("model.visual.blocks.3.attn.qkv.weight", "visual attention", "3"),
        ("model.visual.patch_embed.proj.weight", "visual embeddings", ""),
    ],
)
def test_names_of_parts(tmp_path, key, part, layers):
    folder = checkpoint(tmp_path / "x", {key: torch.zeros(4, 4).bfloat16()})
    # A config without quantization: where the names lead is all that is asked.
    write_json(folder / "config.json", {})
    (group,) = survey(open_ledger(folder)).groups
    assert (group.part, group.layers) == (part, layers)
