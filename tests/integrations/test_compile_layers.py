"""Decoder layers of the real small models as compiled graphs: one per kind, with the eager loss and gradients."""

import logging
import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo import demo
from octavo.errors import EngineError
from octavo.integrations import compiled, taps
from octavo.integrations.compiled import compiled_layers
from octavo.train.routing import ExpertTokens
from tests.integrations.test_matrix import relative

MODELS = Path(demo.__file__).parent / "models"
# GLM: a dense layer, unquantized ones, FP8 ones.
KINDS = {"glm-tiny": 3, "qwen-tiny": 1}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def tuned(name: str, *, layers: int | None = None, checkpointing: bool | None = False) -> peft.PeftModel:
    """The model with LoRA on everything that octavo targets; ``checkpointing``: reentrant or not, None for without."""
    torch.manual_seed(0)
    model = octavo.load_model(MODELS / name, dtype=torch.float32)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
    adapted = peft.get_peft_model(model, octavo.lora_config(model, r=4))
    for key, parameter in adapted.named_parameters():
        # B is zero at first, and then the gradient of every A is
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return adapted.train()


def step(model: nn.Module, length: int, rows: int = 2, **options: object) -> dict[str, Tensor]:
    """The loss, and the gradient of everything that trains."""
    model.zero_grad()
    tokens = torch.arange(rows * length).view(rows, length) * 37 % 400
    output = model(input_ids=tokens, labels=tokens, use_cache=False, **options)
    loss = output.loss
    if logits := getattr(output, "router_logits", None):
        loss = loss + 1e-2 * sum(one.logsumexp(-1).square().mean() for one in logits)
    loss.backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **found}


def assert_same(want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert relative(got[key], value) < 1e-4 or not (value.any() or got[key].any()), key


def graphs() -> int:
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("name", ["qwen-tiny", pytest.param("glm-tiny", marks=pytest.mark.slow)])
def test_one_graph_serves_all_layers_of_a_kind(name):
    model = tuned(name)
    want = step(model, 12), step(model, 9)
    names = [key for key, _ in model.named_parameters()]
    octavo.compile_layers(model, backend="aot_eager")
    assert [key for key, _ in model.named_parameters()] == names
    assert_same(want[0], step(model, 12))
    assert graphs() == KINDS[name]
    assert_same(want[0], step(model, 12))
    assert graphs() == KINDS[name]
    # another length needs none, nor does another number of rows
    assert_same(want[1], step(model, 9))
    step(model, 14, rows=3)
    assert graphs() == KINDS[name]


@pytest.mark.parametrize("checkpointing", [None, True], ids=["without", "reentrant"])
def test_other_kinds_of_checkpointing(checkpointing):
    model = tuned("qwen-tiny", layers=2, checkpointing=checkpointing)
    want = step(model, 12)
    octavo.compile_layers(model, backend="aot_eager")
    assert_same(want, step(model, 12))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++ and needs a compiler for it")
def test_inductor_computes_the_same():
    model = tuned("qwen-tiny", layers=1)
    want = step(model, 12)
    octavo.compile_layers(model)
    assert_same(want, step(model, 12))
    assert graphs() == 1


def test_hooks_that_only_read_see_what_they_would(request):
    """The router logits that transformers collects, with their gradient, and the tokens of experts."""
    model = tuned("qwen-tiny", layers=3)
    counter = ExpertTokens(model, padding=True)
    request.addfinalizer(counter.close)

    def counts() -> list[Tensor]:
        step(model, 12)
        found = [count / count.sum() for count in counter.counts.values()]
        counter.reset()
        return found

    want = step(model, 12, output_router_logits=True)
    shares = counts()
    octavo.compile_layers(model, backend="aot_eager")
    assert_same(want, step(model, 12, output_router_logits=True))
    assert graphs() == 1
    for share, got in zip(shares, counts(), strict=True):
        torch.testing.assert_close(got, share)
    without = step(model, 12)
    assert relative(without["loss"], want["loss"]) > 1e-4
    assert graphs() == 1


def test_a_hook_that_may_change_something_keeps_the_layer_eager():
    model = tuned("qwen-tiny", layers=2)
    octavo.compile_layers(model, backend="aot_eager")
    before = step(model, 12)
    attention = model.base_model.model.model.layers[0].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: (output[0] * 0, *output[1:]))
    changed = step(model, 12)
    handle.remove()
    assert relative(changed["loss"], before["loss"]) > 1e-4
    assert_same(before, step(model, 12))


def test_that_there_are_more_graphs_than_allowed_is_said_and_the_rest_is_eager(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "LIMIT", 1)
    model = tuned("qwen-tiny", layers=2)
    want = step(model, 12), step(model, 9, rows=1)
    octavo.compile_layers(model, backend="aot_eager")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "octavo"):
        for _ in range(2):
            assert_same(want[0], step(model, 12))
            # one row alone is another graph
            assert_same(want[1], step(model, 9, rows=1))
    assert graphs() == 1
    (message,) = [record.getMessage() for record in caplog.records if record.name == "octavo"]
    assert message.startswith("Qwen3MoeDecoderLayer takes more than 1 compiled graphs")
    assert torch._dynamo.config.recompile_limit == 8


def test_a_forward_looks_no_modules_up_anew():
    model = octavo.compile_layers(tuned("qwen-tiny", layers=2), backend="aot_eager")
    step(model, 12)
    before = taps._registrations
    step(model, 12)
    assert taps._registrations == before
    model.base_model.model.model.layers[0].self_attn.extra = nn.Identity()
    assert taps._registrations == before + 1


def test_off_is_as_before():
    model = tuned("glm-tiny")
    classes = [type(module) for module in model.modules()]
    octavo.compile_layers(model, backend="aot_eager")
    step(model, 12)
    assert len(compiled_layers(model)) == 5
    assert "layers 0-4 run as compiled graphs" in str(octavo.describe(model))
    octavo.compile_layers(model, on=False)
    assert [type(module) for module in model.modules()] == classes
    assert not compiled_layers(model)
    assert "compiled" not in str(octavo.describe(model))


def test_evaluation_and_generation_are_eager():
    model = tuned("qwen-tiny", layers=2).eval()
    tokens = torch.arange(6)[None]
    want = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    octavo.compile_layers(model, backend="aot_eager")
    assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False), want)
    assert graphs() == 0


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(EngineError, match="Linear has no decoder layer"):
        octavo.compile_layers(nn.Linear(2, 2))
