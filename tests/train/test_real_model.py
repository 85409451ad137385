"""Training the real FP8 model that ships with the package."""

import gc
from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import octavo
from octavo.nn.experts import Float8Experts
from octavo.nn.linear import Float8Linear
from octavo.train.metrics import read_metrics
from octavo.train.proof import GradientProof

from .tiny import Screen, train

GLM = octavo.demo.checkpoint("glm-tiny")


def tree(out, **section: object) -> dict:
    return {
        "model": {"path": str(GLM), "dtype": "float32"},
        "lora": {"r": 8},
        "data": {"train": str(octavo.demo.data("train")), "max_length": 48},
        "train": {"steps": 6, "batch_size": 2, "lr": 1e-3, "warmup": 0, "precision": "float32", **section},
        "out": str(out),
    }


def test_fp8_resumes_to_bit_equal_losses(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(**tree(straight))
    assert train(Screen(after="step 2/6"), **tree(resumed)).step == 3
    assert train(**tree(resumed)).step == 6
    for key in ("loss", "grad_norm"):
        a, b = ([line[key] for line in read_metrics(out / "metrics.jsonl")] for out in (straight, resumed))
        assert a == b
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_fp8_under_gradient_checkpointing_learns_the_same(tmp_path, kind):
    train(**tree(tmp_path / "without", steps=3, gradient_checkpointing="none"))
    screen = Screen()
    train(screen, **tree(tmp_path / "with", steps=3, gradient_checkpointing=kind))
    assert "gradients after backward 2: 96 tensors proven" in screen.getvalue()
    a, b = ([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("with", "without"))
    # The same recomputed numbers; some gradients are summed in another order.
    assert a == pytest.approx(b, rel=1e-5)


def weight_shapes(model: torch.nn.Module) -> set[tuple[int, ...]]:
    """Shapes that a dequantized weight of an FP8 layer would have: a bank, one expert's matrix, a linear layer's."""
    shapes: set[tuple[int, ...]] = set()
    for module in model.modules():
        if isinstance(module, Float8Experts):
            for name in module.experts_layout.names:
                shape = tuple(module.get_parameter(name).shape)
                shapes |= {shape, shape[1:], (shape[0] * shape[1], shape[2])}
        elif isinstance(module, Float8Linear):
            shapes.add(tuple(module.weight.shape))
    return shapes


def is_wide_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def live_floats() -> Iterator[torch.Tensor]:
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and is_wide_float(thing):
            yield thing


class Held:
    """What a forward leaves behind: saved for backward, or held by any Python object."""

    def __init__(self) -> None:
        self.saved: list[torch.Tensor] = []

    def after(self, forward) -> list[tuple[int, ...]]:
        gc.collect()
        before = {id(tensor) for tensor in live_floats()}
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            self.result = forward()
        gc.collect()
        found = [tensor for tensor in live_floats() if id(tensor) not in before]
        return [tuple(tensor.shape) for tensor in (*found, *self.saved)]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        # The codes themselves are saved too: they are the parameter, and cost nothing.
        if is_wide_float(tensor):
            self.saved.append(tensor)
        return tensor


@pytest.mark.parametrize("kind", [None, "reentrant", "non_reentrant"])
def test_no_dequantized_weight_outlives_the_forward(kind):
    """FIELD 12: banks kept on ctx, in closures or by hooks outlive checkpointing until the backward of their layer."""
    base = octavo.load_model(GLM, dtype=torch.float32)
    shapes = weight_shapes(base)
    model = get_peft_model(base, octavo.lora_config(base, r=8)).train()
    if kind is not None:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        model.enable_input_require_grads()
    # 37 positions: no activation has the shape of a weight.
    ids = torch.arange(37)[None]
    held = Held()
    left = held.after(lambda: model(input_ids=ids, labels=ids).loss)
    assert left, "activations are there"
    # The bf16 layers of this checkpoint are parameters, not results; their factors and views are no weights.
    own = {tuple(p.shape) for p in model.parameters() if p.dtype.is_floating_point}
    assert not [shape for shape in left if shape in shapes - own]
    held.result.backward()
    proof = GradientProof()
    assert proof.after_backward(model).proven == 48


def test_a_dequantized_weight_that_is_held_would_be_seen():
    base = octavo.load_model(GLM, dtype=torch.float32)
    layer = next(module for module in base.modules() if isinstance(module, Float8Linear))
    kept = []
    left = Held().after(lambda: kept.append(layer.weight.float()))
    assert tuple(layer.weight.shape) in left
