"""LoRA without gradient: what peft's own forward gives, in fewer operations."""

import peft
import pytest
import torch
from peft.tuners.lora.layer import Linear as StockLinear
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo.integrations import adoption


class Operations(TorchDispatchMode):
    """Counts operations that compute: views are free on a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def layer(how, adapters=1):
    """The first FP8 layer of a small dense model, wrapped ``how``."""
    torch.manual_seed(0)
    model = octavo.load_model(octavo.demo.checkpoint("dense-tiny"))
    where = {"target_modules": ["q_proj"]} if how == "linear" else {"target_parameters": ["q_proj.weight"]}
    config = peft.LoraConfig(
        r=4, lora_alpha=10, init_lora_weights=False, lora_dropout=0.0, **{"target_modules": [], **where}
    )
    wrapped = peft.get_peft_model(model, config)
    for number in range(1, adapters):
        wrapped.add_adapter(f"other{number}", config)
    wrapped.base_model.set_adapter(["default", *(f"other{number}" for number in range(1, adapters))])
    found = next(part for part in wrapped.eval().modules() if type(part) in (adoption.Linear, adoption.ParamWrapper))
    return wrapped, found


def apart(one, other):
    return ((one - other).float().norm() / other.float().norm()).item()


# one rounding of the sum to bfloat16 in place of three
ROUNDED = 6e-3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("how", ["linear", "weight"])
def test_the_output_is_that_of_peft(how, adapters, autocast):
    _, lora = layer(how, adapters)
    x = torch.randn(2, 3, lora.get_base_layer().in_features, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Operations() as ours:
            got = lora(x)
        with Operations() as peft_s:
            want = StockLinear.forward(lora, x)
        bare = lora.get_base_layer()(x)
    assert got.dtype == want.dtype == torch.bfloat16
    assert apart(got, want) < ROUNDED
    assert apart(bare, want) > 10 * ROUNDED
    assert len(ours.names) < len(peft_s.names)


@pytest.mark.parametrize("how", ["linear", "weight"])
def test_switching_adapters_off_and_training_are_left_to_peft(how):
    wrapped, lora = layer(how)
    x = torch.randn(3, lora.get_base_layer().in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        bare = lora.get_base_layer()(x)
        with wrapped.disable_adapter():
            assert torch.equal(lora(x), bare)
        assert not torch.equal(lora(x), bare)
    trained = lora(x)
    trained.float().sum().backward()
    assert torch.equal(trained.detach(), StockLinear.forward(lora, x).detach())
    assert all(bool(part["default"].weight.grad.any()) for part in (lora.lora_A, lora.lora_B))


def test_dropout_drops_while_it_trains_also_without_gradient():
    _, lora = layer("linear")
    lora.lora_dropout["default"] = torch.nn.Dropout(0.5)
    x = torch.randn(64, lora.get_base_layer().in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        evaluated = lora(x)
        assert torch.equal(evaluated, lora(x))
        lora.train()
        assert not torch.equal(lora(x), lora(x))
