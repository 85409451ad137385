"""The matrix: architecture × layout × files × mixed layers, each against stock transformers and stock peft on the
dequantized model.

Sizes are no multiples of 128. Everything runs in float32, where the two differ by rounding of sums only.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import octavo
from octavo.nn.experts import DenseExperts, Float8Experts
from octavo.nn.linear import Float8Linear
from tests.checkpoints import ARCHS, FURTHER_LAYOUTS, LAYOUTS, Built

FILES = ("one", "shuffled")
MIXED = (False, True)
CELLS = list(itertools.product(ARCHS, (*LAYOUTS, *FURTHER_LAYOUTS), FILES, MIXED))


def pairwise(cells: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """A subset of ``cells`` in which every pair of values of any two axes still meets: greedy, in order, so always
    the same.
    """
    axes = range(len(cells[0]))
    left = {(a, b, cell[a], cell[b]) for cell in cells for a in axes for b in axes if a < b}
    chosen = []
    while left:
        best = max(cells, key=lambda cell: sum((a, b, cell[a], cell[b]) in left for a in axes for b in axes if a < b))
        left -= {(a, b, best[a], best[b]) for a in axes for b in axes if a < b}
        chosen.append(best)
    return chosen


QUICK = pairwise(CELLS)


def cells() -> list[Any]:
    return [
        pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow, id="-".join(map(str, cell)))
        for cell in CELLS
    ]


def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))


def stock(built: Built) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(built.plain, dtype=torch.float32, experts_implementation="eager")
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens()).logits
    return found


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every FP8 stack and layer of ``model``, dequantized, by parameter name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Float8Linear):
            found[f"{name}.weight"] = module.dequantize()
        elif isinstance(module, Float8Experts):
            for stack, parts in zip(module.experts_layout.names, (module.experts_layout.parts, 1), strict=True):
                side = module.side(stack, parts=parts)
                found[f"{name}.{stack}"] = side.spec.assemble(side.weight, side.scales).dequantize()
    return found


def with_adapter(model: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    """``model`` under ``config`` with factors drawn by name, so that two models get the same."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def gradients(model: nn.Module, checkpointing: dict[str, Any] | None) -> dict[str, Tensor]:
    base = model.get_base_model()
    if checkpointing is not None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    base.gradient_checkpointing_disable()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("arch", "layout", "files", "mixed"), cells())
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_cell(built: Callable[..., Built], tmp_path: Path, arch: str, layout: str, files: str, mixed: bool) -> None:
    case = built(arch=arch, layout=layout, files=files, mixed=mixed)
    model, plain = octavo.load_model(case.folder, dtype=torch.float32), stock(case)

    experts = [type(m) for m in model.modules() if isinstance(m, Float8Experts | DenseExperts)]
    assert sum(issubclass(cls, DenseExperts) for cls in experts) == int(mixed)
    assert len(experts) == 2

    # codes are the file's, and weights the dequantized model's, bit for bit
    stored = on_disk(case.folder)
    for name, weight in weights(model).items():
        assert torch.equal(weight.reshape(plain.get_parameter(name).shape), plain.get_parameter(name)), name
    model.save_pretrained(tmp_path / "saved")
    saved = on_disk(tmp_path / "saved")
    assert stored.keys() == saved.keys()
    # what is not FP8 was asked for in float32; the codes, their scales and static activation scales are the file's
    for key, tensor in stored.items():
        again = saved[key] if tensor.dtype != torch.bfloat16 or "scale" in key else saved[key].bfloat16()
        assert same_bytes(again, tensor), key
    assert relative(logits(model), logits(plain)) < 1e-5

    config = octavo.lora_config(model, r=4, expert_rank=2)
    ours, theirs = with_adapter(model, config), with_adapter(plain, config)
    assert relative(logits(ours), logits(theirs)) < 1e-5
    want = gradients(theirs, None)
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        got = gradients(ours, checkpointing)
        assert got.keys() == want.keys()
        for name in want:
            cosine = F.cosine_similarity(got[name].flatten().double(), want[name].flatten().double(), 0)
            assert cosine > 0.99999, (name, checkpointing)
            assert abs(got[name].norm() / want[name].norm() - 1) < 1e-4, (name, checkpointing)

    # the adapter goes from ours to stock peft and back
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = on_disk(tmp_path / "ours"), on_disk(tmp_path / "theirs")
    assert {key: (t.shape, t.dtype) for key, t in a.items()} == {key: (t.shape, t.dtype) for key, t in b.items()}
    reloaded = peft.PeftModel.from_pretrained(stock(case), tmp_path / "ours").eval()
    assert relative(logits(reloaded), logits(ours)) < 1e-5
    back = octavo.load_model(case.folder, dtype=torch.float32)
    assert relative(logits(peft.PeftModel.from_pretrained(back, tmp_path / "theirs").eval()), logits(theirs)) < 1e-5


def test_the_quick_cells_cover_every_pair() -> None:
    for a, b in itertools.combinations(range(4), 2):
        assert {(c[a], c[b]) for c in QUICK} == {(c[a], c[b]) for c in CELLS}
    assert len(QUICK) < len(CELLS) / 2
