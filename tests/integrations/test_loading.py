"""Loading and saving: both routes, what is refused with the model class at hand, heads, values, memory."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers import auto

import octavo
from octavo import demo
from octavo.errors import CheckpointError, EngineError
from octavo.formats.scheme import ScaleLayout
from octavo.formats.weight import quantize
from octavo.integrations.quantizer import OctavoQuantizer
from octavo.nn.experts import DenseExperts, Float8Experts
from octavo.nn.linear import Float8Linear
from octavo.nn.settings import Settings
from tests.checkpoints import Built, build, copy_of, edit_config, edit_index, edit_tensors
from tests.integrations.test_matrix import logits, on_disk, relative, same_bytes, stock


def test_enabled_is_reversible_and_equal_to_load_model(built: Callable[..., Built]) -> None:
    case = built(layout="fp8-block")
    mappings = (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING)
    loaded = octavo.load_model(case.folder)
    before = [dict(mapping) for mapping in mappings]
    with octavo.enabled(engine="reference"):
        model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.bfloat16)
    assert [dict(mapping) for mapping in mappings] == before
    assert all(m.settings.engine == "reference" for m in model.modules() if isinstance(m, Float8Linear))
    octavo.configure(model, engine="auto")
    assert torch.equal(logits(model), logits(loaded))
    with pytest.raises(ZeroDivisionError), octavo.enabled():
        raise ZeroDivisionError
    assert [dict(mapping) for mapping in mappings] == before


def test_enabled_leaves_other_methods_to_transformers() -> None:
    with octavo.enabled():
        config = auto.AutoQuantizationConfig.from_dict({"quant_method": "fp8", "weight_block_size": [128, 128]})
        assert type(config).__name__ == "OctavoConfig"
        int4 = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
        assert type(auto.AutoQuantizationConfig.from_dict(int4)).__name__ == "CompressedTensorsConfig"
        mxfp4 = auto.AutoQuantizationConfig.from_dict({"quant_method": "mxfp4"})
        assert type(mxfp4).__name__ == "Mxfp4Config"


def test_enabled_warns_of_float32(built: Callable[..., Built], caplog: pytest.LogCaptureFixture) -> None:
    with octavo.enabled(), caplog.at_level(logging.WARNING, "octavo"):
        AutoModelForCausalLM.from_pretrained(built(layout="fp8-block").folder, dtype=torch.float32)
    assert "with dtype float32" in caplog.text


@pytest.mark.parametrize("layout", ["bf16"])
def test_plain_checkpoints_load_as_in_transformers(built: Callable[..., Built], tmp_path: Path, layout: str) -> None:
    case = built(layout=layout, arch="glm")
    model = octavo.load_model(case.folder, dtype=torch.float32)
    assert sum(isinstance(m, DenseExperts) for m in model.modules()) == 2
    assert relative(logits(model), logits(stock(case))) < 1e-5
    model.save_pretrained(tmp_path)
    plain = octavo.load_model(case.folder, dtype=torch.float32, engine="stock")
    assert not any(isinstance(m, DenseExperts) for m in plain.modules())
    plain.save_pretrained(tmp_path / "stock")
    a, b = on_disk(tmp_path), on_disk(tmp_path / "stock")
    assert a.keys() == b.keys()
    assert all(same_bytes(a[key], b[key]) for key in a)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("numerics", ["fp8", "fp8_grad"])
def test_numerics_of_fp8_are_refused_where_nothing_is_in_fp8(built: Callable[..., Built], numerics: str) -> None:
    """Else a run would say fp8 and compute exactly."""
    folder = built(layout="bf16", arch="glm").folder
    with pytest.raises(EngineError, match=f"numerics '{numerics}' is about products with FP8 weights, and Glm"):
        octavo.load_model(folder, numerics=numerics)
    model = octavo.load_model(folder)
    with pytest.raises(EngineError, match="has none: nothing would change"):
        octavo.configure(model, numerics=numerics)
    assert all(m.settings == Settings() for m in model.modules() if isinstance(m, DenseExperts))
    with pytest.raises(EngineError, match=r"engine 'fused' reads FP8 weights, and Glm.* has none"):
        octavo.load_model(folder, engine="fused")


def test_configure_changes_every_module_or_none(built: Callable[..., Built]) -> None:
    model = octavo.load_model(built(layout="fp8-block").folder)
    with pytest.raises(EngineError, match="engine 'dequant' cannot compute numerics 'fp8'"):
        octavo.configure(model, numerics="fp8", engine="dequant")
    ours = [m for m in model.modules() if isinstance(m, Float8Linear | Float8Experts)]
    assert {m.settings.numerics for m in ours} == {"exact"}
    exact = logits(model)
    octavo.configure(model, numerics="fp8")
    assert all("numerics=fp8, engine=reference (auto)" in repr(m) for m in ours)
    with pytest.raises(EngineError, match="engine 'fused' cannot run this layer: its kernels need a GPU"):
        octavo.configure(model, numerics="exact", engine="fused")
    assert {m.settings for m in ours} == {Settings("fp8")}
    assert 1e-4 < relative(logits(model), exact) < 0.2


def test_describe_says_what_is_stored_where(built: Callable[..., Built]) -> None:
    model = octavo.load_model(built(layout="ct-channel", arch="glm", mixed=True).folder)
    rows = {(row.module, row.storage): row for row in octavo.describe(model).rows}
    assert rows["model.layers.*.mlp.experts", "bfloat16"].layers == "1"
    fp8 = rows["model.layers.*.mlp.experts", "FP8 channel"]
    assert (fp8.layers, fp8.count, fp8.trains) == ("2", 1, 0)
    own = dict(model.get_submodule("model.layers.2.mlp.experts").named_parameters())
    assert fp8.gigabytes == pytest.approx(sum(p.numel() * p.element_size() for p in own.values()) / 1e9)
    assert "model.layers.*.mlp.experts" in str(octavo.describe(model))


# What only the model class can tell; the ledger's own refusals are tested with it.


def damaged(case: Built, folder: Path, change: Callable[[Path], None]) -> str:
    """The message of the refusal by ``load_model``, which ``enabled`` gives too."""
    copy = copy_of(case, folder)
    change(copy)
    with pytest.raises(CheckpointError) as refused:
        octavo.load_model(copy)
    with pytest.raises((CheckpointError, OSError)), octavo.enabled():
        AutoModelForCausalLM.from_pretrained(copy, dtype=torch.bfloat16)
    return str(refused.value)


def pop(key: str) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(key))


def put(key: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, lambda tensors: tensors.__setitem__(key, make(tensors)))


Q = "model.layers.2.self_attn.q_proj"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(
            pop(NORM), ["'model.norm.weight'", "Qwen3MoeForCausalLM", "at random"], id="a parameter is missing"
        ),
        pytest.param(
            put("model.layers.2.mlp.bogus.weight", lambda t: torch.ones(3)),
            ["model.safetensors", "'model.layers.2.mlp.bogus.weight'", "belongs to no parameter"],
            id="nothing claims a tensor",
        ),
        pytest.param(
            put(NORM, lambda t: torch.ones(7, dtype=torch.bfloat16)),
            ["'model.norm.weight' has shape [7]", "has [192]"],
            id="a plain tensor of another shape",
        ),
        pytest.param(
            lambda folder: edit_tensors(
                folder,
                lambda t: (t.pop(f"{Q}.weight_scale"), t.__setitem__(f"{Q}.weight", t[f"{Q}.weight"].bfloat16())),
            ),
            [f"'{Q}.weight' is BF16", "declares it FP8", "ignore list"],
            id="a linear layer that should be FP8 is not",
        ),
        pytest.param(
            put("model.norm.weight_scale", lambda t: torch.ones(1)),
            ["'model.norm.weight' as BF16 with a scale"],
            id="a scale of a norm",
        ),
    ],
)
def test_refused_with_the_model_class(
    built: Callable[..., Built], tmp_path: Path, change: Callable[[Path], None], says: list[str]
) -> None:
    message = damaged(built(layout="ct-channel"), tmp_path / "copy", change)
    for part in says:
        assert part in message, message


EXPERT = "model.layers.1.mlp.experts.4.up_proj"


def poison(key: str, value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(-1)[5] = value

    return lambda folder: edit_tensors(folder, change)


def poison_code(key: str, byte: int) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(torch.uint8).view(-1)[77] = byte

    return lambda folder: edit_tensors(folder, change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(poison(f"{EXPERT}.weight_scale", float("nan")), "nan", id="NaN scale"),
        pytest.param(poison(f"{EXPERT}.weight_scale", float("inf")), "inf", id="infinite scale"),
        pytest.param(poison(f"{EXPERT}.weight_scale", 0.0), "first 0", id="zero scale"),
        pytest.param(poison(f"{EXPERT}.weight_scale", -1.0), "first -1", id="negative scale"),
        pytest.param(poison_code(f"{EXPERT}.weight", 0x7F), "codes that are NaN", id="NaN code"),
        pytest.param(poison_code(f"{EXPERT}.weight", 0xFF), "codes that are NaN", id="negative NaN code"),
        pytest.param(poison_code(f"{Q}.weight", 0x7F), "codes that are NaN", id="NaN code of a linear layer"),
        pytest.param(poison(f"{Q}.weight_scale", -2.0), "first -2", id="negative scale of a linear layer"),
    ],
)
def test_bad_values_are_named_with_file_and_tensor(
    built: Callable[..., Built], tmp_path: Path, change: Callable[[Path], None], says: str
) -> None:
    message = damaged(built(layout="ct-channel"), tmp_path / "copy", change)
    assert says in message
    culprit = Q if "linear" in says or Q in message else EXPERT
    assert f"model.safetensors: {culprit}.weight" in message


def test_files_that_plain_transformers_would_take_are_refused(built: Callable[..., Built], tmp_path: Path) -> None:
    case = built(layout="fp8-block", files="shuffled")
    message = damaged(
        case,
        tmp_path / "a",
        lambda folder: edit_index(folder, lambda index: index.__setitem__("x.weight", "../x.safetensors")),
    )
    assert "../x.safetensors" in message
    message = damaged(case, tmp_path / "b", lambda folder: (folder / "model-00002-of-00003.safetensors").unlink())
    assert "model-00002-of-00003.safetensors" in message


def test_an_ignore_list_that_misses_an_expert_is_refused(built: Callable[..., Built], tmp_path: Path) -> None:
    """FIELD: looking at the first MoE layer, or at the first expert, tells nothing."""
    case = built(layout="ct-channel", mixed=True)
    name = "model.layers.1.mlp.experts.3.down_proj"
    message = damaged(
        case, tmp_path / "copy", lambda folder: edit_config(folder, lambda config: config["ignore"].remove(name))
    )
    assert "model.layers.1.mlp.experts" in message


@pytest.mark.parametrize("layout", [ScaleLayout("channel"), ScaleLayout("block", (128, 128))], ids=str)
def test_an_fp8_output_head_is_dequantized_and_saved_as_it_was(tmp_path: Path, layout: ScaleLayout) -> None:
    """trl's fused head reads ``lm_head.weight``: codes there would be used as weights."""
    case = build(tmp_path / "case", layout="ct-channel" if layout.kind == "channel" else "fp8-block")
    suffix = "weight_scale" if layout.kind == "channel" else "weight_scale_inv"
    plain = load_file(case.plain / "model.safetensors")
    head = quantize(plain["lm_head.weight"], layout)

    def quantize_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = head.codes[0, 0].clone()
        tensors[f"lm_head.{suffix}"] = head.scales[0, 0].clone()

    edit_tensors(case.folder, quantize_head)
    edit_tensors(case.plain, lambda tensors: tensors.__setitem__("lm_head.weight", head.dequantize()[0]))

    def declare_head(config: dict[str, Any]) -> None:
        config["ignore" if "ignore" in config else "modules_to_not_convert"].remove("lm_head")

    edit_config(case.folder, declare_head)
    for dtype in (torch.float32, torch.bfloat16):
        model = octavo.load_model(case.folder, dtype=dtype)
        assert model.lm_head.weight.dtype == dtype
        assert torch.equal(model.lm_head.weight, head.dequantize(dtype)[0])
        model.save_pretrained(tmp_path / str(dtype))
        stored, saved = on_disk(case.folder), on_disk(tmp_path / str(dtype))
        assert stored.keys() == saved.keys()
        for key in ("lm_head.weight", f"lm_head.{suffix}"):
            assert same_bytes(saved[key], stored[key])
    assert relative(logits(octavo.load_model(case.folder, dtype=torch.float32)), logits(stock(case))) < 1e-5
    broken = copy_of(case, tmp_path / "broken")
    poison_code("lm_head.weight", 0x7F)(broken)
    with pytest.raises(CheckpointError, match=r"model.safetensors: lm_head.weight' has 1 of .* codes that are NaN"):
        octavo.load_model(broken)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' was FP8 .* has changed since it was loaded"):
        model.save_pretrained(tmp_path / "changed")


def test_a_hub_id_is_found_in_the_local_cache(
    built: Callable[..., Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's own layout: blobs, and snapshots of links to them by revision."""
    case = built(layout="fp8-block", files="shuffled")
    repository = tmp_path / "hub" / "models--someone--some-moe"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for number, file in enumerate(sorted(case.folder.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = octavo.load_model("someone/some-moe", revision=revision, local_files_only=True)
    assert model.config.name_or_path == "someone/some-moe"
    assert torch.equal(logits(model), logits(octavo.load_model(case.folder)))
    with pytest.raises(CheckpointError, match="'someone/other' is neither a folder nor a hub repository"):
        octavo.load_model("someone/other", local_files_only=True)


def test_loading_again_and_again_nests_nothing(built: Callable[..., Built]) -> None:
    """FIELD 20: wrappers that nest per load in a shared class end in a RecursionError."""
    folder = built(layout="fp8-block").folder
    classes = {type(octavo.load_model(folder).get_submodule("model.layers.1.mlp.experts")) for _ in range(25)}
    assert len(classes) == 1
    assert len(classes.pop().__mro__) < 10


MEASURE = """
import resource, sys, threading, time
import torch
import octavo
folder = sys.argv[1]
from octavo.integrations import transformers
torch.set_num_threads(1)
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
peak, done = [anonymous()], []
start = peak[0]
def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = octavo.load_model(folder)
done.append(True)
thread.join()
layers = {}
for name, tensor in model.state_dict().items():
    key = ".".join(name.split(".")[:3])
    layers[key] = layers.get(key, 0) + tensor.numel() * tensor.element_size()
print(peak[0] - start, sum(layers.values()), max(layers.values()))
"""


def test_peak_memory_of_a_load(tmp_path: Path) -> None:
    """At most the model plus twice its largest layer, in anonymous memory (the mapped files are the page cache's)."""
    sizes = {
        "hidden_size": 512,
        "moe_intermediate_size": 384,
        "num_experts": 32,
        "num_hidden_layers": 9,
        "vocab_size": 512,
    }
    case = build(tmp_path / "case", layout="fp8-block", files="shuffled", **sizes)
    command = [sys.executable, "-c", MEASURE, str(case.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, size, layer = map(int, done.stdout.split())
    # what an allocator and the imports on first use take, whatever the model's size
    slack = 24_000_000
    assert size > 5 * slack
    assert grown <= size + 2 * layer + slack, (grown, size, layer)


def test_a_static_activation_scale_of_an_fp8_head_is_checked_and_kept(tmp_path: Path) -> None:
    case = build(tmp_path / "case", layout="ct-tensor")
    weight = load_file(case.plain / "model.safetensors")["lm_head.weight"]
    head = quantize(weight, ScaleLayout("tensor"), scale_dtype=torch.bfloat16)

    def quantize_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = head.codes[0, 0].clone()
        tensors["lm_head.weight_scale"] = head.scales[0, 0].reshape(1).bfloat16()
        tensors["lm_head.input_scale"] = torch.tensor([0.25])

    edit_tensors(case.folder, quantize_head)
    edit_config(case.folder, lambda config: config["ignore"].remove("lm_head"))
    model = octavo.load_model(case.folder)
    assert torch.equal(model.lm_head.weight, head.dequantize(torch.bfloat16)[0])
    model.save_pretrained(tmp_path / "saved")
    stored, saved = on_disk(case.folder), on_disk(tmp_path / "saved")
    assert stored.keys() == saved.keys()
    assert all(same_bytes(saved[key], stored[key]) for key in stored)
    edit_tensors(case.folder, lambda tensors: tensors["lm_head.input_scale"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"model.safetensors: lm_head.input_scale'"):
        octavo.load_model(case.folder)


@pytest.mark.parametrize("spread", [False, True])
def test_small_tensors_are_not_reserved_twice(monkeypatch: pytest.MonkeyPatch, spread: bool):
    """torch has blocks of their own for them on a GPU; transformers reserves the rest in one piece. Where it fills
    several devices by what a tensor takes, they count.
    """
    found: list[float] = []

    def finished(self, model: nn.Module, **_: object) -> object:
        for rows in (1 << 9, (1 << 9) + 1):
            found.append(
                self.param_element_size(model, "lm_head.weight", torch.empty(rows, 1 << 10, dtype=torch.bfloat16))
            )
        return process(self, model)

    process = OctavoQuantizer._process_model_after_weight_loading
    monkeypatch.setattr(OctavoQuantizer, "_process_model_after_weight_loading", finished)
    octavo.load_model(demo.checkpoint("qwen-tiny"), device_map="auto" if spread else "cpu")
    assert found == ([2, 2] if spread else [0, 2])
