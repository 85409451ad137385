"""LoRA on FP8 modules trains what stock peft trains on the dequantized float32 model: output and every gradient."""

import peft
import pytest
import torch
import torch.nn.functional as F

from octavo.integrations import adoption
from tests.integrations.peft_models import (
    FAMILIES,
    LAYOUTS,
    Pair,
    config_for,
    gradients,
    logits,
    pair,
    randomize,
    relative,
)

# Both sides compute in float32 and differ in the order of sums only.
COSINE = 0.99999
NORM = 1e-4
FORWARD = 1e-5

CHECKPOINTING = {"kept": None, "reentrant": True, "non-reentrant": False}


def adapted(models: Pair, family: str, **changes: object) -> Pair:
    """Both models under peft, with the same values in the factors."""
    wrapped = [randomize(peft.get_peft_model(model, config_for(family, **changes))) for model in models]
    return Pair(*wrapped)


def assert_gradients_agree(ours: torch.nn.Module, stock: torch.nn.Module) -> None:
    got, want = gradients(ours), gradients(stock)
    assert set(got) == set(want)
    for name, expected in want.items():
        assert got[name] is not None, f"no gradient for {name}"
        assert expected.norm() > 0, name
        assert F.cosine_similarity(got[name].flatten(), expected.flatten(), 0) > COSINE, name
        assert abs(got[name].norm() / expected.norm() - 1) < NORM, name


@pytest.mark.parametrize("checkpointing", CHECKPOINTING.values(), ids=CHECKPOINTING.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_own_config_is_exact(family, layout, checkpointing):
    models = adapted(pair(family, layout), family)
    assert relative(logits(models.ours), logits(models.stock)) < FORWARD
    if checkpointing is not None:
        for model in models:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    assert_gradients_agree(*models)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hook_fired_on_every_wrapper(family):
    model = peft.get_peft_model(pair(family).ours, config_for(family))
    layers = [part for part in model.modules() if isinstance(part, peft.tuners.lora.LoraLayer)]
    assert {type(layer) for layer in layers} == {adoption.Linear, adoption.ParamWrapper}
    assert {type(layer).__name__ for layer in layers} == {"Linear", "ParamWrapper"}
