"""The life of an adapter on FP8 modules: every way in, files exchanged with stock peft, several at once, copies."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from octavo.integrations import adoption
from tests.integrations.peft_models import (
    FAMILIES,
    config_for,
    factors,
    gradients,
    logits,
    pair,
    randomize,
    relative,
    sealed,
    tokens,
)

# Both sides compute in float32 and differ in the order of sums only.
FORWARD = 1e-5


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lora_layers(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if isinstance(part, peft.tuners.lora.LoraLayer)]


def stock_layers(model: nn.Module) -> list[nn.Module]:
    """LoRA layers of ``model`` that were not adopted."""
    return [part for part in lora_layers(model) if type(part) not in (adoption.Linear, adoption.ParamWrapper)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A GLM adapter trained by stock peft, as files."""
    stock = randomize(peft.get_peft_model(pair("glm").stock, config_for("glm")))
    stock.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def by_get_peft_model(model: nn.Module, folder: Path) -> nn.Module:
    wrapped = peft.get_peft_model(model, config_for("glm"))
    peft.set_peft_model_state_dict(wrapped, stored(folder))
    return wrapped


def by_from_pretrained(model: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, folder)


def by_from_pretrained_on_meta(model: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)


def by_load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    wrapped = peft.get_peft_model(model, config_for("glm"), adapter_name="first")
    wrapped.load_adapter(folder, "second")
    wrapped.set_adapter("second")
    return wrapped


def by_injection(model: nn.Module, folder: Path) -> nn.Module:
    injected = peft.inject_adapter_in_model(config_for("glm"), model)
    peft.set_peft_model_state_dict(
        injected, {k.removeprefix("base_model.model."): v for k, v in stored(folder).items()}
    )
    return injected


def by_transformers_add_adapter(model: nn.Module, folder: Path) -> nn.Module:
    model.add_adapter(config_for("glm"))
    peft.set_peft_model_state_dict(model, {k.removeprefix("base_model.model."): v for k, v in stored(folder).items()})
    return model


def by_transformers_load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    model.load_adapter(str(folder))
    return model


WAYS_IN: list[Callable[[nn.Module, Path], nn.Module]] = [
    by_get_peft_model,
    by_from_pretrained,
    by_from_pretrained_on_meta,
    by_load_adapter,
    by_injection,
    by_transformers_add_adapter,
    by_transformers_load_adapter,
]


@pytest.mark.parametrize("way", WAYS_IN, ids=lambda way: way.__name__.removeprefix("by_"))
def test_every_way_into_a_model_is_adopted_and_exact(way, saved):
    models = pair("glm")
    want = logits(peft.PeftModel.from_pretrained(models.stock, saved))
    before = sealed(models.ours)
    wrapped = way(models.ours, saved).eval()
    assert stock_layers(wrapped) == []
    assert relative(logits(wrapped), want) < FORWARD
    assert all(torch.equal(value, before[name]) for name, value in sealed(wrapped).items())


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_those_of_stock_peft_and_travel_both_ways(family, tmp_path):
    models = pair(family)
    ours, stock = (randomize(peft.get_peft_model(copy.deepcopy(model), config_for(family))) for model in models)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    mine, theirs = stored(tmp_path / "ours"), stored(tmp_path / "stock")
    assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "stock")]
    for config in configs:
        for unordered in ("target_modules", "target_parameters"):
            config[unordered] = sorted(config[unordered])
    assert configs[0] == configs[1]

    loaded_by_stock = peft.PeftModel.from_pretrained(models.stock, tmp_path / "ours")
    assert relative(logits(loaded_by_stock), logits(ours)) < FORWARD
    loaded_by_us = peft.PeftModel.from_pretrained(models.ours, tmp_path / "stock")
    assert relative(logits(loaded_by_us), logits(stock)) < FORWARD


@pytest.mark.parametrize("family", FAMILIES)
def test_a_is_float32_and_drawn_as_stock_peft_draws_it(family):
    """On FP8 layers and on plain stacks of experts; stock rounds A on the bf16 model."""
    drawn = []
    for dtype in (torch.float32, torch.bfloat16):
        for model in pair(family, dtype=dtype, plain=lambda name: name.endswith("layers.1.mlp.experts")):
            torch.manual_seed(11)
            drawn.append(factors(peft.get_peft_model(model, config_for(family))))
    ours32, stock32, ours16, stock16 = drawn
    rounded = 0
    for name, want in stock32.items():
        for got in (ours32[name], ours16[name]):
            assert got.dtype == torch.float32
            assert torch.equal(got, want), name
        rounded += not torch.equal(stock16[name], want)
    assert rounded > 0, "stock peft no longer rounds A on a bf16 model: ParamWrapper need not move the factors itself"


def test_several_adapters_add_up_and_switch():
    models = pair("glm")
    wrapped = []
    for model in models:
        model = peft.get_peft_model(model, config_for("glm"), adapter_name="one")
        model.add_adapter("two", config_for("glm", r=3, lora_alpha=3, rank_pattern={}))
        wrapped.append(randomize(model).eval())
    ours, stock = wrapped
    bare = logits(pair("glm").ours)
    seen = []
    for active in ("one", "two", ["one", "two"]):
        for model in wrapped:
            # PeftModel.set_adapter takes one name; several are set on the tuner
            model.base_model.set_adapter(active)
        seen.append(logits(ours))
        assert relative(seen[-1], logits(stock)) < FORWARD
    assert relative(seen[0], seen[1]) > 0.01
    assert relative(seen[2], seen[1]) > 0.01
    for model in wrapped:
        model.train()
    got, want = gradients(ours), gradients(stock)
    assert len(got) == 2 * len(factors(peft.get_peft_model(pair("glm").ours, config_for("glm"))))
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)
    ours.eval()
    with ours.disable_adapter():
        assert torch.equal(logits(ours), bare)
    assert torch.equal(logits(ours), seen[2])
    ours.delete_adapter("two")
    ours.set_adapter("one")
    assert torch.equal(logits(ours), seen[0])


def test_other_ranks_and_scalings_by_target():
    changes = {
        "use_rslora": True,
        "rank_pattern": {r"experts\.gate_up_proj": 3, r"experts\.down_proj": 1, "o_proj": 5},
        "alpha_pattern": {r"experts\.down_proj": 3, "o_proj": 2},
    }
    models = pair("glm")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        ours = randomize(peft.get_peft_model(models.ours, config_for("glm", **changes)))
    stock = randomize(peft.get_peft_model(models.stock, config_for("glm", **changes)))
    scalings = [{layer.scaling["default"] for layer in lora_layers(model)} for model in (ours, stock)]
    assert scalings[0] == scalings[1]
    assert len(scalings[0]) == 4
    assert relative(logits(ours), logits(stock)) < FORWARD


def test_a_pattern_that_matches_nothing_is_still_announced():
    with pytest.warns(UserWarning, match=r"rank_pattern has 'no_such_layer'"):
        peft.get_peft_model(pair("glm").ours, config_for("glm", rank_pattern={"no_such_layer": 2}))


@pytest.mark.parametrize(
    "extra",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": tokens()[0, :2].tolist()}],
    ids=["head", "tokens"],
)
def test_trained_heads_and_tokens(extra, tmp_path):
    models = pair("glm")
    ours, stock = (randomize(peft.get_peft_model(model, config_for("glm", **extra))) for model in models)
    got, want = gradients(ours), gradients(stock)
    trained = [name for name in want if ".lora_" not in name]
    assert len(trained) == 1
    assert set(got) == set(want)
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)
    for model in (ours, stock):
        with torch.no_grad():
            model.get_parameter(trained[0]).add_(0.5)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(pair("glm").stock, tmp_path)
    assert relative(logits(loaded), logits(ours.eval())) < FORWARD
    assert relative(logits(stock.eval()), logits(ours)) < FORWARD


def test_autocast_casts_what_stock_peft_casts():
    """bf16 products on both sides: their errors are of one size.

    Every expert is chosen, so that no rounding changes the routing.
    """
    models = pair("glm", num_experts_per_tok=6)
    ours, stock = (randomize(peft.get_peft_model(model, config_for("glm"))) for model in models)
    exact = logits(stock)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = logits(ours), logits(stock)
        grads = gradients(ours)
    assert got.dtype == want.dtype
    error = relative(want, exact)
    assert 0 < relative(got, exact) < 1.5 * error
    assert all(torch.isfinite(grad).all() and grad.norm() > 0 for grad in grads.values())


def test_a_copy_is_a_model_of_its_own():
    ours = randomize(peft.get_peft_model(pair("glm").ours, config_for("glm"))).eval()
    before = logits(ours)
    twin = copy.deepcopy(ours)
    assert stock_layers(twin) == []
    assert torch.equal(logits(twin), before)
    randomize(twin, seed=4)
    assert relative(logits(twin), before) > 0.01
    assert torch.equal(logits(ours), before)
    twin.add_adapter("late", config_for("glm"))
    assert stock_layers(twin) == []


def test_casting_the_model_leaves_codes_and_scales():
    ours = peft.get_peft_model(pair("glm").ours, config_for("glm"))
    before = sealed(ours)
    ours.to(torch.bfloat16)
    after = sealed(ours)
    assert len(before) > 20
    assert set(after) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert torch.isfinite(logits(ours)).all()


@pytest.mark.parametrize("module", ["layers.1.mlp.experts", "layers.0.mlp.gate_proj", "layers.1.self_attn.o_proj"])
def test_adopted_layers_compile_without_a_break(module):
    model = randomize(peft.get_peft_model(pair("glm").ours, config_for("glm")))
    layer = model.base_model.model.get_submodule(f"model.{module}")
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(8, layer.get_base_layer().in_features if "experts" not in module else 72, generator=generator)
    ]
    if "experts" in module:
        inputs += [torch.randint(0, 6, (8, 2), generator=generator), torch.rand(8, 2, generator=generator)]
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained = [parameter for name, parameter in layer.named_parameters() if "lora_" in name]
    results = []
    for forward in (layer, compiled):
        output = forward(*inputs)
        results.append([output, *torch.autograd.grad(output.square().sum(), trained)])
    for want, got in zip(*results, strict=True):
        assert relative(got.detach(), want.detach()) < FORWARD
