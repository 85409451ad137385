"""Dense FP8 checkpoints load, compute, train and generate through the same calls as mixtures of experts."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import octavo
from octavo.nn.linear import Float8Linear
from octavo.train.proof import GradientProof
from tests.checkpoints import DENSE_ARCHS, build

LAYOUTS = ("fp8-block", "ct-channel", "ct-tensor", "ct-block", "fp8-tensor")


@pytest.fixture(scope="module", params=[(arch, layout) for arch in DENSE_ARCHS for layout in LAYOUTS], ids="-".join)
def pair(request, tmp_path_factory):
    """The FP8 model on octavo, and its dequantized twin on stock transformers, both in float32."""
    arch, layout = request.param
    made = build(tmp_path_factory.mktemp("dense") / "checkpoint", arch=arch, layout=layout)
    stock = AutoModelForCausalLM.from_pretrained(made.plain, dtype=torch.float32)
    return made, octavo.load_model(made.folder, dtype=torch.float32, engine="reference"), stock


def test_every_linear_layer_stays_in_fp8_and_computes_the_same(pair):
    made, model, stock = pair
    kept = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert kept == set(made.quantized)
    assert len(kept) >= 3 * 6
    ids = torch.randint(0, 256, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_it_generates_the_same_tokens(pair):
    _, model, stock = pair
    ids = torch.randint(0, 256, (2, 5))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "use_cache": True}
    assert torch.equal(model.generate(ids, **given), stock.generate(ids, **given))


def test_lora_has_the_gradients_of_the_dequantized_model(pair):
    _, model, stock = pair
    config = octavo.lora_config(model, r=4, init=False)
    ids = torch.randint(0, 256, (2, 11))
    gradients = []
    for base in (model, stock):
        torch.manual_seed(0)
        tuned = get_peft_model(base, config).train()
        tuned.zero_grad()
        tuned(input_ids=ids, labels=ids).loss.backward()
        GradientProof().after_backward(tuned)
        gradients.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
        tuned.unload()
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    projections = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in ours}
    assert {"q_proj", "o_proj", "down_proj"} <= projections, "attention and the MLP train"
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-5 * float(theirs[name].abs().max()))


def test_the_small_real_model_writes_dictionary_entries():
    folder = octavo.demo.checkpoint("dense-tiny")
    model, tokenizer = octavo.load_model(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    entries = ["walk, v. Move on foot.<|end|>", "river, n. A body of running water.<|end|>"]
    losses = []
    for text in entries:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    shuffled = tokenizer("foot walk on,.v Move running n body", return_tensors="pt").input_ids
    with torch.no_grad():
        assert max(losses) + 1 < model(shuffled, labels=shuffled).loss.item()
    assert octavo.describe(model).rows[1].storage == "FP8 block 128x128"
