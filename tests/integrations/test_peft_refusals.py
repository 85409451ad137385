"""What would read or write FP8 codes as if they were weights stops with the name of the layer and the way out."""

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig
from torch import nn

from octavo.errors import AdapterError
from octavo.integrations import adoption
from tests.integrations.peft_models import (
    ATTENTION,
    config_for,
    factors,
    gradients,
    logits,
    pair,
    randomize,
    relative,
    sealed,
)


def q_proj_config(**changes):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_a_proj"], **changes})


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload safe": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter safe": lambda model: model.merge_adapter(safe_merge=True),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())
@pytest.mark.parametrize("config", [config_for("glm"), q_proj_config()], ids=["experts", "linear"])
def test_merging_stops_before_anything_changed(merge, config, tmp_path):
    """Right after a reload, with no forward in between; the plain layer 0 comes before the first FP8 one."""
    randomize(peft.get_peft_model(pair("glm").stock, config)).save_pretrained(tmp_path)
    ours = pair("glm", plain=lambda name: "layers.0." in name).ours
    model = peft.PeftModel.from_pretrained(ours, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.self_attn\.q_a_proj.*unload\(\)"):
        merge(model)
    after = dict(model.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(parameter, before[name]) for name, parameter in after.items())
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


@pytest.mark.parametrize("safe", [False, True])
def test_each_layer_refuses_to_merge_by_itself(safe):
    model = randomize(peft.get_peft_model(pair("glm").ours, config_for("glm")))
    before = sealed(model)
    layers = [part for part in model.modules() if type(part) in (adoption.Linear, adoption.ParamWrapper)]
    for layer in layers:
        with pytest.raises(AdapterError, match=r"cannot be merged into (Float8Linear|Float8Glm4MoeLite)"):
            layer.merge(safe_merge=safe)
        assert not layer.merged
    assert all(torch.equal(value, before[name]) for name, value in sealed(model).items())


def test_stock_peft_still_writes_into_codes():
    """The reason for all this: the day it fails, peft knows that integer weights are codes, and adoption may shrink."""
    model = randomize(peft.get_peft_model(pair("glm").ours, q_proj_config()))
    layer = model.base_model.model.model.layers[0].self_attn.q_a_proj
    for factor in (layer.lora_A, layer.lora_B):
        factor["default"].weight.data.mul_(10)
    codes = layer.base_layer.weight.clone()
    delta = layer.get_delta_weight("default")
    peft.tuners.lora.Linear.merge(layer, safe_merge=True)
    # cut to integers, added to codes, without their scale
    assert torch.equal(layer.base_layer.weight, codes + delta.to(torch.uint8))
    assert not torch.equal(layer.base_layer.weight, codes)


def test_an_adapter_without_fp8_layers_merges():
    ours = pair("glm", plain=lambda name: "layers.0." in name).ours
    model = peft.get_peft_model(ours, config_for("glm"), adapter_name="all")
    model.add_adapter(
        "first", config_for("glm", target_parameters=None, target_modules=["o_proj"], layers_to_transform=0)
    )
    model.base_model.set_adapter("first")
    randomize(model).eval()
    want = logits(model)
    model.merge_adapter(["first"])
    assert relative(logits(model), want) < 1e-5
    with pytest.raises(AdapterError):
        model.merge_adapter(["all"])


def test_unload_gives_back_the_bare_model():
    models = pair("glm")
    want, before = logits(models.ours), sealed(models.ours)
    model = randomize(peft.get_peft_model(models.ours, config_for("glm")))
    assert relative(logits(model), want) > 0.01
    bare = model.unload()
    assert not [part for part in bare.modules() if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert torch.equal(logits(bare), want)
    assert all(torch.equal(value, before[name]) for name, value in sealed(bare).items())
    again = peft.get_peft_model(bare, config_for("glm"))
    assert torch.equal(logits(again), want)


REFUSED = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED.keys())
def test_lora_that_reads_the_weight_is_refused(changes):
    ours = pair("glm").ours
    before = sealed(ours)
    config = q_proj_config()
    for name, value in changes.items():
        # set here: the constructor asks for the optional packages of some of these
        setattr(config, name, value)
    with pytest.raises(AdapterError, match=r"does not work on Float8Linear .*load the model again"):
        peft.get_peft_model(ours, config)
    assert all(torch.equal(value, before[name]) for name, value in sealed(ours).items())


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "orthogonal"])
def test_stacks_are_drawn_blind_only(init):
    config = config_for("glm", target_modules=[], target_parameters=["mlp.experts.down_proj"], init_lora_weights=init)
    with pytest.raises(AdapterError, match=r"does not work on Float8Glm4MoeLite"):
        peft.get_peft_model(pair("glm").ours, config)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_peft_itself_refuses_these_on_parameters(changes):
    with pytest.raises(ValueError, match=r"ParamWrapper does not work with"):
        peft.get_peft_model(pair("glm").ours, config_for("glm", target_modules=[], **changes))


def test_a_refused_second_adapter_leaves_the_first():
    model = randomize(peft.get_peft_model(pair("glm").ours, q_proj_config()))
    want = logits(model)
    with pytest.raises(AdapterError, match="DoRA"):
        model.add_adapter("second", q_proj_config(use_dora=True))
    assert torch.equal(logits(model), want)


WORKING = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "no init": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("changes", WORKING.values(), ids=WORKING.keys())
def test_lora_that_only_adds_to_the_output_is_exact(changes):
    models = pair("glm")
    got = []
    for model in models:
        torch.manual_seed(2)
        wrapped = peft.get_peft_model(model, q_proj_config(target_modules=ATTENTION["glm"], **changes))
        if "init_lora_weights" not in changes:
            randomize(wrapped)
        torch.manual_seed(4)
        got.append((logits(wrapped), gradients(wrapped), factors(wrapped)))
    (mine, grads, drawn), (theirs, want, stock) = got
    assert relative(mine, theirs) < 1e-5
    assert all(torch.equal(drawn[name], stock[name]) for name in stock)
    assert all(relative(grads[name], want[name]) < 1e-4 for name in want if want[name].norm() > 0)


def test_eva_starts_from_the_inputs_of_fp8_layers():
    models = pair("glm")
    batches = [
        {"input_ids": torch.randint(1, 90, (4, 12), generator=torch.Generator().manual_seed(s))} for s in range(4)
    ]
    drawn = []
    for model in models:
        config = q_proj_config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
        wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
        torch.manual_seed(0)
        peft.initialize_lora_eva_weights(wrapped, dataloader=batches, show_progress_bar=False)
        drawn.append(factors(wrapped))
    ours, stock = drawn
    assert set(ours) == set(stock)
    for name, want in stock.items():
        # singular vectors: up to their sign
        assert relative(ours[name].abs(), want.abs()) < 1e-3 if want.norm() > 0 else ours[name].norm() == 0


OTHER_METHODS = {
    "ia3": peft.IA3Config(
        target_modules=["q_a_proj", "o_proj"], feedforward_modules=["o_proj"], init_ia3_weights=False
    ),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_a_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_a_proj"], init_weights=False),
}


@pytest.mark.parametrize("config", OTHER_METHODS.values(), ids=OTHER_METHODS.keys())
def test_methods_that_act_on_the_output_work_and_do_not_merge(config):
    models = pair("glm")
    wrapped = []
    for model in models:
        torch.manual_seed(6)
        wrapped.append(peft.get_peft_model(model, config))
    ours, stock = wrapped
    assert relative(logits(ours), logits(stock)) < 1e-5
    got, want = gradients(ours), gradients(stock)
    assert all(relative(got[name], want[name]) < 1e-4 for name in want)
    before = sealed(ours)
    for merge in MERGES.values():
        with pytest.raises(AdapterError, match=r"model\.layers\.0\.self_attn"):
            merge(ours)
    for layer in ours.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            with pytest.raises(AdapterError, match="cannot be merged into Float8Linear"):
                layer.merge()
    assert all(torch.equal(value, before[name]) for name, value in sealed(ours).items())


UNKNOWN_METHODS = {
    "adalora": peft.AdaLoraConfig(target_modules=["q_a_proj"], total_step=10),
    "vera": peft.VeraConfig(target_modules=["q_a_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_a_proj"], r=4, oft_block_size=0),
    "hra": peft.HRAConfig(target_modules=["q_a_proj"]),
}


@pytest.mark.parametrize("config", UNKNOWN_METHODS.values(), ids=UNKNOWN_METHODS.keys())
def test_other_methods_are_refused_by_name(config):
    with pytest.raises(AdapterError, match=r"was put on Float8Linear .*LoRA, \(IA\)³, LoHa and LoKr"):
        peft.get_peft_model(pair("glm").ours, config)


@pytest.mark.parametrize("name", ["mlp.experts.gate_up_proj_scale", "q_a_proj.weight_scale"])
def test_scales_are_not_a_target(name):
    with pytest.raises(AdapterError, match=r"LoRA is possible there on"):
        peft.get_peft_model(pair("glm").ours, config_for("glm", target_modules=[], target_parameters=[name]))


@pytest.mark.parametrize("name", ["o_proj", "mlp"])
def test_fp8_modules_are_not_copied_for_training(name):
    with pytest.raises(AdapterError, match=r"modules_to_save .*FP8 codes cannot be trained"):
        peft.get_peft_model(pair("glm").ours, q_proj_config(modules_to_save=[name]))


class _Add(nn.Module):
    def forward(self, weight):
        return weight + 1


@pytest.mark.parametrize(
    ("module", "name"),
    [("model.layers.1.mlp.experts", "down_proj"), ("model.layers.1.self_attn.o_proj", "weight")],
)
def test_a_parametrization_of_the_codes_stops_the_forward(module, name):
    ours = pair("glm").ours
    nn.utils.parametrize.register_parametrization(ours.get_submodule(module), name, _Add(), unsafe=True)
    with pytest.raises(AdapterError, match=rf"{name} of .*octavo.lora_config"):
        logits(ours)


def test_models_that_octavo_did_not_load_keep_their_stock_wrappers():
    model = peft.get_peft_model(pair("glm").stock, config_for("glm"))
    modules = {type(part).__module__.split(".")[0] for part in model.modules()}
    assert "octavo" not in modules
    assert type(model.base_model) is peft.LoraModel
