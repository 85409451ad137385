"""The checkpoints that benchmarks run on are what the real ones are: names, dtypes, shapes, configs; and they train."""

import json
from pathlib import Path

import peft
import pytest
import torch

import octavo
import octavo.demo
from benchmarks.checkpoints import GLM, KINDS, build_plain, entries, resolve, shards, stacks, write
from octavo.checkpoint.accounting import open_ledger
from octavo.checkpoint.headers import read_header
from octavo.checkpoint.survey import survey
from octavo.nn.experts import DenseExperts, Float8Experts

GB = 1e9
# Weights and scales once loaded, scales in float32, as computed for the real models from their configs.
LOADED_GB = {"glm": 32.55, "qwen3-coder": 31.2, "qwen3-8b": 9.44}
FILES = {"glm": 7, "qwen3-coder": 7, "qwen3-8b": 2}
# How many layers of the small form have experts, and how many of those are in FP8.
EXPERTS = {"glm": (2, 1), "qwen3-coder": (2, 2), "qwen3-8b": (0, 0)}


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / request.param
    write(request.param, folder, tiny=True, shard_bytes=2_000_000)
    return folder


@pytest.mark.parametrize("name", list(KINDS))
def test_full_size_weighs_what_the_real_one_does(name):
    kind = KINDS[name]
    found = [entry for stack in stacks(kind) for entry in entries(kind, stack)]
    loaded = sum(entry.nbytes * (2 if entry.key.endswith("weight_scale") else 1) for entry in found)
    assert loaded / GB == pytest.approx(LOADED_GB[name], abs=0.03)
    assert len({entry.key for entry in found}) == len(found)
    files = shards(iter(found), 5_000_000_000)
    assert len(files) == FILES[name]
    assert all(sum(entry.nbytes for entry in held) <= 5_000_000_000 for held in files)
    assert [entry for held in files for entry in held] == found


@pytest.mark.parametrize("name", ["glm", "qwen3-coder"])
def test_a_plain_one_is_the_model_in_bfloat16(name, tmp_path):
    write(name, tmp_path, tiny=True, plain=True)
    model = octavo.load_model(tmp_path, engine="reference")
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    plain = build_plain(name, tiny=True)
    assert found == {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}
    spread = {key: value.float().std().item() for key, value in model.named_parameters() if value.ndim > 1}
    assert spread == pytest.approx(
        {key: value.float().std().item() for key, value in plain.named_parameters() if value.ndim > 1}, rel=0.5
    )


def test_names_dtypes_and_shapes_are_those_of_a_saved_model():
    """The small model that ships was written from a transformers model by another way."""
    source = octavo.demo.checkpoint("glm-tiny")
    config = json.loads((source / "config.json").read_text())
    known = {key: config[key] for key in GLM.sizes if key in config}
    kind = GLM.resized(**known)
    made = {
        entry.key: (entry.dtype, entry.shape) for stack in stacks(kind) for entry in entries(kind, stack)
    }  # fmt: skip
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    real = {
        entry.key: (dtypes[entry.dtype], entry.shape)
        for file in sorted(source.glob("*.safetensors"))
        for entry in read_header(file).values()
    }
    # which layers are plain differs: 1 here, the experts of 3 there
    same = {key for key in real if not key.startswith(("model.layers.1.", "model.layers.3."))}
    assert {key: made[key] for key in same} == {key: real[key] for key in same}
    assert {key for key in made if key.endswith(".weight")} == {key for key in real if key.endswith(".weight")}


def test_every_tensor_is_accounted_for(folder):
    ledger = open_ledger(folder)
    found = survey(ledger)
    assert found.total.tensors == len(ledger.entries)
    assert not ledger.ignored
    assert len(ledger.files) > 1
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert found.total.nbytes == index["metadata"]["total_size"]
    storages = {group.storage for group in found.groups if group.part == "routed experts"}
    expected = {"glm": {"FP8 channel", "BF16"}, "qwen3-coder": {"FP8 block 128x128"}, "qwen3-8b": set()}
    assert storages == expected[folder.name]


def test_loads_and_trains(folder):
    model = octavo.load_model(folder, dtype=torch.float32)
    experts = [module for module in model.modules() if isinstance(module, Float8Experts | DenseExperts)]
    in_fp8 = sum(isinstance(module, Float8Experts) for module in experts)
    assert (len(experts), in_fp8) == EXPERTS[folder.name]
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=4))
    tokens_BS = torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.log(torch.tensor(4096.0)).item(), rel=0.2)
    assert losses[-1] < losses[0] - 0.5


def test_the_spread_is_not_that_of_a_normal_distribution(folder):
    """Rows differ in size and some values are far off, or a per-tensor scale would serve as well as a finer one."""
    model = octavo.load_model(folder)
    weight = model.get_input_embeddings().weight.detach().float()
    rms_V = weight.square().mean(1).sqrt()
    assert (rms_V.quantile(0.95) / rms_V.quantile(0.05)).item() > 2.5
    assert ((weight / weight.std()) ** 4).mean().item() > 5


@pytest.mark.parametrize("name", list(KINDS))
def test_plain_model_has_the_same_parameters(name):
    model = build_plain(name, tiny=True)
    kind = resolve(name, tiny=True)
    count = sum(
        torch.Size(stack.shape).numel() * len(stack.names)
        for stack in stacks(kind)
        if not stack.suffix.startswith(".e_score")
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    tokens_BS = torch.randint(0, 4096, (1, 16))
    octavo.configure(model)
    assert torch.isfinite(model(input_ids=tokens_BS, labels=tokens_BS).loss)


def test_layers_can_be_cut(tmp_path):
    write("glm", tmp_path / "cut", layers=2, tiny=True)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_hidden_layers"] == 2
    assert {
        entry.key.split(".")[2] for entry in open_ledger(tmp_path / "cut").entries.values() if "layers" in entry.key
    } == {
        "0",
        "1",
    }
