"""Whole models of every family: an FP8 checkpoint on octavo against the dequantized one in stock transformers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import octavo
from octavo.nn.experts import DenseExperts, Float8Experts

from . import table
from .checkpoints import LAYOUTS, everything, save_quantized
from .discovery import causal_lm_class
from .tiny import VOCABULARY, class_called, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def causal_model(name: str) -> PreTrainedModel:
    cls = class_called(name)
    if causal_lm_class(cls) is None:
        pytest.skip(f"AutoModelForCausalLM builds nothing around {name}")
    return tiny_model(cls)


def outputs(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """The logits, and the gradient of the loss with respect to the embedded tokens."""
    ids = torch.randint(1, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(3))
    embedded: list[Tensor] = []

    def keep(_: object, __: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    logits = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    (grad,) = torch.autograd.grad(loss, embedded[0])
    return logits.detach(), grad


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", table.FLOAT8)
def test_a_whole_model_is_the_dequantized_one(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[table.FLOAT8.index(name) % len(LAYOUTS)]
    saved = save_quantized(causal_model(name), tmp_path / "fp8", layout)
    # stacked on disk there is no FP8 form of the experts to read: they stay plain, and the layers around them are FP8
    stacked = name in table.STACKED_ON_DISK
    assert stacked != bool(saved.experts)
    ours = octavo.load_model(saved.folder, dtype=torch.float32)
    assert any(isinstance(module, DenseExperts if stacked else Float8Experts) for module in ours.modules())
    stock = AutoModelForCausalLM.from_pretrained(saved.plain, dtype=torch.float32, experts_implementation="eager")
    for got, want in zip(outputs(ours), outputs(stock.eval()), strict=True):
        assert relative(got, want) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    assert everything(tmp_path / "again") == everything(saved.folder)


@pytest.mark.parametrize("name", sorted(table.PLAIN_ONLY | table.NOT_OURS))
def test_plain_checkpoints_of_the_others_load(name: str, tmp_path: Path) -> None:
    model = causal_model(name)
    model.save_pretrained(tmp_path / "plain")
    ours = octavo.load_model(tmp_path / "plain", dtype=torch.float32)
    for got, want in zip(outputs(ours), outputs(model), strict=True):
        assert relative(got, want) < 1e-5
