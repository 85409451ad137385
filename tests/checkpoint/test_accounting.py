"""Checkpoints that are in order: every tensor has its place, for every layout, and a large one is read fast."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.checkpoint.accounting import Ledger, open_ledger
from octavo.errors import CheckpointError
from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import Float8Weight, multipliers
from tests.checkpoints import (
    ARCHS,
    FURTHER_LAYOUTS,
    LAYOUTS,
    RECIPES,
    Built,
    copy_of,
    edit_config,
    edit_index,
    edit_tensors,
    quantization_config,
    read_json,
    write_json,
    write_raw,
)

Get = Callable[..., Built]


def places(ledger: Ledger) -> list[str]:
    """Every key that the ledger accounts for, as often as it does."""
    quantized = [
        entry.key
        for weight in ledger.quantized.values()
        for entry in (weight.weight, weight.scale, weight.activation)
        if entry is not None
    ]
    return sorted([*quantized, *ledger.plain, *ledger.ignored])


@pytest.mark.parametrize("layout", [*LAYOUTS, *FURTHER_LAYOUTS])
@pytest.mark.parametrize("files", ["one", "shuffled"])
@pytest.mark.parametrize("mixed", [False, True], ids=["all", "mixed"])
def test_every_tensor_of_every_layout(built: Get, layout, files, mixed):
    case = built(arch="glm", layout=layout, files=files, mixed=mixed)
    ledger = open_ledger(case.folder)
    assert places(ledger) == sorted(ledger.entries)
    assert set(ledger.quantized) == set(case.quantized)
    assert len(ledger.files) == (3 if files == "shuffled" else 1)
    assert all(ledger.scheme.layout_of(module) is None for module in case.ignored)
    recipe = RECIPES[layout]
    for module, weight in ledger.quantized.items():
        assert weight.layout == recipe.layout
        assert weight.module == module
        assert (weight.activation is None) == (recipe.activation is None)
        assert weight.weight.dtype == "F8_E4M3"
    assert open_ledger(ledger.files).quantized == ledger.quantized


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("layout", ["ct-channel", "fp8-block", "ue8m0", "modelopt"])
def test_ledger_and_bytes_give_the_plain_checkpoint_back(built: Get, arch, layout):
    """Read by byte range, dequantized by the ledger's layout: bit-equal to the dequantized sibling."""
    case = built(arch=arch, layout=layout, files="shuffled")
    ledger = open_ledger(case.folder)
    want = load_file(case.plain / "model.safetensors")
    stored = {k: v for file in ledger.files for k, v in load_file(file).items()}
    for weight in ledger.quantized.values():
        codes = stored[weight.weight.key]
        content = weight.weight.file.read_bytes()[weight.weight.start : weight.weight.end]
        assert content == codes.view(torch.uint8).numpy().tobytes()
        rows, cols = codes.shape
        scales = multipliers(stored[weight.scale.key]).reshape(weight.layout.grid(rows, cols))
        found = Float8Weight.from_storage(codes, scales, block=weight.layout.block_of(rows, cols))
        assert torch.equal(found.dequantize()[0], want[weight.weight.key])
    for key in ledger.plain:
        assert torch.equal(stored[key].float(), want[key])
    assert want.keys() == {w.weight.key for w in ledger.quantized.values()} | ledger.plain.keys()


@pytest.mark.parametrize("arch", ARCHS)
def test_stock_transformers_loads_the_plain_sibling(built: Get, arch):
    from transformers import AutoModelForCausalLM

    case = built(arch=arch, layout="fp8-block", mixed=True)
    model, info = AutoModelForCausalLM.from_pretrained(case.plain, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32, torch.bfloat16])
def test_every_dtype_of_ue8m0_scales(built: Get, dtype):
    case = built(arch="qwen", layout="ue8m0", scale_dtype=dtype)
    assert set(open_ledger(case.folder).quantized) == set(case.quantized)


@pytest.mark.parametrize("block", [(64, 32), (16, 16), (1, 32), (256, 256)], ids=str)
def test_every_block_size(built: Get, block):
    case = built(arch="qwen", layout="fp8-block", block=block)
    ledger = open_ledger(case.folder)
    assert {weight.layout for weight in ledger.quantized.values()} == {ScaleLayout("block", block)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["ct-tensor", "fp8-tensor", "modelopt"])
def test_every_shape_of_one_value(built: Get, tmp_path, layout, shape):
    folder = copy_of(built(arch="qwen", layout=layout), tmp_path / "x")

    def change(tensors):
        for key in tensors:
            if key.endswith(("scale", "scale_inv")):
                tensors[key] = tensors[key].reshape(shape)

    edit_tensors(folder, change)
    assert open_ledger(folder).quantized


def test_channel_scales_without_their_second_dimension(built: Get, tmp_path):
    """As transformers up to 5.22 saves them."""
    folder = copy_of(built(arch="qwen", layout="ct-channel"), tmp_path / "x")
    edit_tensors(folder, lambda tensors: tensors.update({k: v[:, 0] for k, v in tensors.items() if "scale" in k}))
    assert open_ledger(folder).quantized


@pytest.mark.parametrize("alias", ["scale", "qscale_weight"])
def test_other_names_of_a_scale(built: Get, tmp_path, alias):
    folder = copy_of(built(arch="qwen", layout="fp8-block"), tmp_path / "x")

    def change(tensors):
        for key in [key for key in tensors if key.endswith("weight_scale_inv")]:
            tensors[key.replace("weight_scale_inv", alias)] = tensors.pop(key)
        # A parameter with a common name, beside no codes: not ours.
        tensors["model.layers.0.clip.scale"] = torch.ones(1)

    edit_tensors(folder, change)
    ledger = open_ledger(folder)
    assert all(weight.scale.key.endswith(alias) for weight in ledger.quantized.values())
    assert "model.layers.0.clip.scale" in ledger.plain


def test_kv_cache_scales_that_the_config_names(built: Get, tmp_path):
    folder = copy_of(built(arch="qwen", layout="ct-channel"), tmp_path / "x")
    keys = [f"model.layers.{i}.self_attn.{n}_scale" for i in range(3) for n in "kv"]
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(1) for key in keys}))
    with pytest.raises(CheckpointError, match=r"6 tensors of a quantization that the config does not declare.*k_scale"):
        open_ledger(folder)
    edit_config(folder, lambda config: config.update(kv_cache_scheme={"num_bits": 8, "type": "float"}))
    ledger = open_ledger(folder)
    assert sorted(ledger.ignored) == sorted(keys)
    assert set(ledger.ignored.values()) == {"scale of the key-value cache (kv_cache_scheme)"}


def test_modelopt_with_its_settings_beside_the_config(built: Get, tmp_path):
    case = built(arch="qwen", layout="modelopt")
    folder = copy_of(case, tmp_path / "x")
    config = read_json(folder / "config.json")
    own = config.pop("quantization_config")
    write_json(folder / "config.json", config)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": own["ignore"]}
    write_json(folder / "hf_quant_config.json", {"producer": own["producer"], "quantization": quantization})
    ledger = open_ledger(folder)
    assert set(ledger.quantized) == set(case.quantized)
    # A loader may bring the content of config.json along.
    assert open_ledger(ledger.files, config=config).quantized == ledger.quantized


def test_two_groups_in_one_checkpoint(built: Get, tmp_path):
    """Attention per channel, experts and the rest in blocks."""
    case, other = built(arch="qwen", layout="ct-block"), built(arch="qwen", layout="ct-channel")
    folder = copy_of(case, tmp_path / "x")
    channel = load_file(other.folder / "model.safetensors")
    edit_tensors(folder, lambda tensors: tensors.update({k: v for k, v in channel.items() if "self_attn" in k}))

    def change(config):
        group = quantization_config("ct-channel", [])["config_groups"]["group_0"]
        config["config_groups"]["group_1"] = {**group, "targets": ["re:.*self_attn.*"]}

    edit_config(folder, change)
    ledger = open_ledger(folder)
    kinds = {(("self_attn" in module), weight.layout.kind) for module, weight in ledger.quantized.items()}
    assert kinds == {(True, "channel"), (False, "block")}
    assert ledger.scheme.activation == "mixed"


class TestUnquantized:
    """What plain transformers loads is not refused."""

    @pytest.mark.parametrize("files", ["one", "shuffled"])
    def test_is_all_plain(self, built: Get, files):
        ledger = open_ledger(built(arch="qwen", layout="bf16", files=files).folder)
        assert ledger.scheme is None
        assert not ledger.quantized
        assert not ledger.ignored
        assert ledger.plain == ledger.entries

    @pytest.mark.parametrize("quirk", ["extra", "gone", "elsewhere"])
    def test_an_index_may_be_untidy(self, built: Get, tmp_path, quirk):
        folder = copy_of(built(arch="qwen", layout="bf16", files="shuffled"), tmp_path / "x")

        def change(weight_map):
            first = next(iter(weight_map))
            if quirk == "extra":
                weight_map["model.layers.9.gone.weight"] = weight_map[first]
            elif quirk == "gone":
                del weight_map[first]
            else:
                weight_map[first] = next(name for name in weight_map.values() if name != weight_map[first])

        edit_index(folder, change)
        assert not open_ledger(folder).quantized

    def test_names_that_only_look_like_scales(self, built: Get, tmp_path):
        folder = copy_of(built(arch="qwen", layout="bf16"), tmp_path / "x")
        edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.weight_scale": torch.ones(3)}))
        assert "model.layers.0.weight_scale" in open_ledger(folder).plain

    def test_a_missing_expert_is_transformers_own_business(self, built: Get, tmp_path):
        folder = copy_of(built(arch="qwen", layout="bf16"), tmp_path / "x")
        edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight"))
        assert not open_ledger(folder).quantized


def hub_cache(root: Path, folder: Path) -> Path:
    """The folder's files as the hub's cache lays them out; returns the snapshot."""
    repo = root / "models--someone--tiny"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / f"{number:064x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("files", ["one", "shuffled"])
def test_a_snapshot_of_the_hub_cache_is_links_to_blobs(built: Get, tmp_path, files):
    case = built(arch="qwen", layout="ct-channel", files=files)
    snapshot = hub_cache(tmp_path, case.folder)
    ledger = open_ledger(snapshot)
    assert ledger.folder == snapshot
    assert set(ledger.quantized) == set(case.quantized)
    assert {file.parent for file in ledger.files} == {snapshot}
    again = open_ledger([str(file) for file in ledger.files])
    assert again.folder == snapshot
    assert again.quantized == ledger.quantized


def test_files_of_another_set_than_the_index(built: Get, tmp_path):
    """A variant: its own file names, which the index beside them does not speak of."""
    folder = copy_of(built(arch="qwen", layout="ct-channel", files="shuffled"), tmp_path / "x")
    files = [file.rename(file.with_name("variant." + file.name)) for file in sorted(folder.glob("*.safetensors"))]
    assert open_ledger(files).quantized


def test_one_file_wins_over_an_index_as_in_transformers(built: Get, tmp_path):
    folder = copy_of(built(arch="qwen", layout="ct-channel"), tmp_path / "x")
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"gone": "model-00001-of-00001.safetensors"}})
    assert [file.name for file in open_ledger(folder).files] == ["model.safetensors"]


def synthetic(folder: Path, *, layers: int, experts: int) -> int:
    """A checkpoint of real size whose data is a hole: headers are true, no byte of a tensor is on the disk."""
    tensors: list[tuple[str, str, list[int]]] = []
    for layer in range(layers):
        names = [f"mlp.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up", "down")]
        names += [f"self_attn.{p}_proj" for p in "qkvo"]
        for name in names:
            shape = [2048, 768] if "down" in name else [768, 2048]
            module = f"model.layers.{layer}.{name}"
            tensors.append((f"{module}.weight", "F8_E4M3", shape))
            tensors.append((f"{module}.weight_scale", "BF16", [shape[0], 1]))
        tensors.append((f"model.layers.{layer}.input_layernorm.weight", "BF16", [2048]))
    weight_map: dict[str, str] = {}
    for shard in range(16):
        name = f"model-{shard + 1:05d}-of-00016.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for key, dtype, shape in tensors[shard::16]:
            size = shape[0] * (shape[1] if len(shape) > 1 else 1) * (1 if dtype == "F8_E4M3" else 2)
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
            weight_map[key] = name
        write_raw(folder / name, header, b"")
        with (folder / name).open("r+b") as stream:
            stream.truncate((folder / name).stat().st_size + position)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    ignored = [
        f"model.layers.{layers}.mlp.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up", "down")
    ]
    config = quantization_config("ct-channel", ignored)
    write_json(folder / "config.json", {"num_experts": experts, "quantization_config": config})
    return len(tensors)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """75 000 tensors in 16 shards, 60 GB on paper."""
    folder = tmp_path_factory.mktemp("large")
    return folder, synthetic(folder, layers=96, experts=128)


def test_a_large_checkpoint_is_read_fast(large):
    folder, count = large
    times = []
    for _ in range(3):
        start = time.process_time()
        ledger = open_ledger(folder)
        times.append(time.process_time() - start)
    assert len(ledger.entries) == count > 74_000
    # 0.8 s of processor time on one core of a server; a step that is slow per tensor takes several times that.
    assert min(times) < 2.5, times


def test_inspecting_a_large_checkpoint_needs_no_torch(large):
    folder, count = large
    code = (
        "import sys; from octavo.cli.main import main; sys.argv = ['octavo', 'inspect', sys.argv[1], '--json']\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    wall = time.monotonic() - start
    assert json.loads(done.stdout)["accounting"]["accounted"] == count
    assert done.stderr.strip() == "False"
    # 1.5 s here. Importing torch alone takes 2, the promise for a checkpoint of this size is 6.
    assert wall < 6, wall
