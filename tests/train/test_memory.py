"""What a step holds: attention without a mask, hidden states on the host, no full logits, narrow adapters."""

import gc
import os
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeForCausalLM
from trl.trainer.utils import add_fused_lm_head

import octavo
from octavo.cli.memory import let_segments_grow
from octavo.errors import ConfigError, OctavoError
from octavo.train.config import parse_config
from octavo.train.meter import Meter
from octavo.train.metrics import read_metrics, record
from octavo.train.offload import HiddenStatesOnHost, Offloaded
from octavo.train.packed import PACKED, packed_attention, use_packed_attention
from octavo.train.planned import planned
from octavo.train.progress import metrics_text

from .tiny import chat, tiny_config, train, tree, write_jsonl

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is optional")


def losses(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


class Largest(TorchDispatchMode):
    """The most elements that any one operation returned, of the tensors that ``counts`` takes."""

    def __init__(self, counts: Callable[[torch.Tensor], bool] = lambda tensor: True) -> None:
        super().__init__()
        self.numel = 0
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and self._counts(tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.fixture
def model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(tiny_config())


def attention_inputs(heads: int, kv_heads: int, length: int, width: int, value_width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return [
        torch.randn(1, h, length, d, generator=generator, dtype=torch.float64, requires_grad=True) for h, d in shapes
    ]


@pytest.mark.parametrize("starts", [[0, 5, 6, 30], [0, 30]], ids=["three", "one"])
@pytest.mark.parametrize(("heads", "kv_heads", "value_width"), [(4, 2, 8), (3, 3, 6)], ids=["grouped", "wide"])
def test_packed_attention_is_attention_under_the_dense_mask(starts, heads, kv_heads, value_width):
    tensors = attention_inputs(heads, kv_heads, 30, 8, value_width)
    bounds = torch.tensor(starts, dtype=torch.int32)
    got, _ = packed_attention(
        torch.nn.Module(), *tensors, None, scaling=0.3, cu_seq_lens_q=bounds, max_length_q=int(bounds.diff().max())
    )
    example_S = torch.searchsorted(bounds, torch.arange(30, dtype=torch.int32), right=True)
    mask_SS = (example_S[:, None] == example_S[None]) & torch.ones(30, 30, dtype=torch.bool).tril()
    query, key, value = (t.detach().clone().requires_grad_() for t in tensors)
    spread = [t.repeat_interleave(heads // kv_heads, 1) for t in (key, value)]
    want = F.scaled_dot_product_attention(query, *spread, attn_mask=mask_SS, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, want)
    weights = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for mine, theirs in zip(tensors, (query, key, value), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_packed_attention_refuses_what_it_does_not_compute(model):
    q, k, v = attention_inputs(2, 2, 4, 8, 8)
    with pytest.raises(ValueError, match="takes no mask"):
        packed_attention(model, q, k, v, torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="1 queries met 4 keys"):
        packed_attention(model, q[:, :, :1], k, v, None)
    with pytest.raises(ValueError, match="does not compute softcap"):
        packed_attention(model, q, k, v, None, softcap=30.0)
    model.config.sliding_window = 8
    with pytest.raises(ConfigError, match="sliding window"):
        use_packed_attention(model)


def test_packed_rows_train_as_under_the_dense_mask_and_no_mask_is_made(tmp_path, checkpoint):
    data = write_jsonl(tmp_path / "chats.jsonl", [chat(index) for index in range(48)])
    runs = {}
    for name in ("auto", "sdpa"):
        config = tree(checkpoint, data, tmp_path / name, batch_size=1, seed=1)
        config["model"]["attention"] = name
        config["data"] |= {"packing": True, "max_length": 512}
        with Largest(lambda t: t.ndim >= 2 and t.shape[-1] == t.shape[-2] > 100) as largest:
            train(**config)
        runs[name] = losses(tmp_path / name), largest.numel
    assert runs["auto"][0] == pytest.approx(runs["sdpa"][0], rel=1e-5)
    assert runs["sdpa"][1] >= 400 * 400, "the dense mask would have been seen"
    assert runs["auto"][1] == 0


def test_hidden_states_leave_and_come_back_unchanged(model):
    """One per layer and what the loss keeps; gradients are equal to the bit, and each was fetched ahead of its use."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tuned = peft.get_peft_model(octavo.configure(model), octavo.lora_config(model, r=2))
    tuned.enable_input_require_grads()
    tuned.train()
    tokens_BS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))

    def gradients() -> dict[str, torch.Tensor]:
        tuned(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss.backward()
        found = {name: p.grad.clone() for name, p in tuned.named_parameters() if p.grad is not None}
        tuned.zero_grad()
        return found

    want = gradients()
    offload = HiddenStatesOnHost(tuned.parameters(), torch.device("cpu"), min_bytes=1)
    kept: list[Offloaded] = []
    fetches: list[str] = []
    pack, unpack = offload._pack, offload._unpack

    def packing(tensor):
        found = pack(tensor)
        if isinstance(found, Offloaded):
            kept.append(found)
        return found

    def unpacking(found):
        if isinstance(found, Offloaded):
            fetches.append("ahead" if found.fetched is not None else "late")
        return unpack(found)

    offload._pack, offload._unpack = packing, unpacking
    with offload:
        loss = tuned(input_ids=tokens_BS, labels=tokens_BS, use_cache=False).loss
    # The loss without trl's chunks keeps logits too; hidden states are those of width H.
    hidden = [k for k in kept if k.host.shape == (2, 40, 32) and k.host.dtype == torch.float32]
    assert len(hidden) >= model.config.num_hidden_layers
    assert offload.bytes_offloaded == sum(k.host.nbytes for k in kept)
    loss.backward()
    got = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert fetches[0] == "late"
    assert fetches.count("ahead") >= model.config.num_hidden_layers - 1
    del loss, hidden
    assert all(k.fetched is None for k in kept), "what was fetched is not held a second time"
    left = [weakref.ref(k) for k in kept]
    kept.clear()
    gc.collect()
    assert all(ref() is None for ref in left), "nothing but the graph holds host memory"


def test_parameters_stay(model):
    """The output head is kept by the loss; 0.6 GB of it would go to the host in each step."""
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
    head.requires_grad_(False)
    offload = HiddenStatesOnHost(model.parameters(), torch.device("cpu"), min_bytes=1)
    x = torch.randn(3, 32, requires_grad=True)
    with offload:
        y = F.linear(x * 2, head).sum() + embeddings[:1].sum()
    assert offload.bytes_offloaded < head.nbytes
    y.backward()
    torch.testing.assert_close(x.grad, 2 * head.sum(0).expand(3, -1))


def test_checkpointing_keeps_one_hidden_state_per_layer():
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(tiny_config(num_hidden_layers=4, mlp_only_layers=[]))
    tuned = peft.get_peft_model(octavo.configure(model), octavo.lora_config(model, r=2))
    tuned.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tuned.train()
    # As octavo sft trains: trl's head, which keeps its input and no logits.
    add_fused_lm_head(model)
    tokens_BS = torch.randint(0, 256, (1, 200))
    parameters = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    sizes = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        tuned(input_ids=tokens_BS, labels=tokens_BS, fused_lm_head=True).loss.backward()
    hidden = 200 * 32 * 4
    per_layer = [size for size in sizes if size == hidden]
    # Four layers, and the final norm with the loss, which are not checkpointed.
    assert 4 <= len(per_layer) <= 4 + 4
    assert sum(sizes) < hidden * (4 + 6)


def test_the_loss_makes_no_full_logits_and_is_that_of_transformers():
    """trl's output head works in tiles of the vocabulary. Were that to change, our memory would not hold."""
    torch.manual_seed(0)
    vocabulary, tokens = 70_000, 96
    model = Qwen3MoeForCausalLM(tiny_config(vocab_size=vocabulary, num_hidden_layers=1, mlp_only_layers=[0]))
    model.lm_head.weight.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(False)
    labels_BS = torch.randint(0, vocabulary, (1, tokens))
    labels_BS[:, :7] = -100
    count = torch.tensor(200)
    want = model(input_ids=labels_BS.clamp(min=0), labels=labels_BS, num_items_in_batch=count).loss
    want.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    add_fused_lm_head(model)
    with Largest() as largest:
        got = model(
            input_ids=labels_BS.clamp(min=0), labels=labels_BS, fused_lm_head=True, num_items_in_batch=count
        ).loss
        got.backward()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-7)
    # The largest tensor is a weight of the head, 32 wide, not logits for 95 tokens.
    assert largest.numel <= tokens * 32_768 < (tokens - 1) * vocabulary


def test_offloading_changes_no_loss(tmp_path, checkpoint, chats):
    train(**tree(checkpoint, chats, tmp_path / "kept"))
    train(**tree(checkpoint, chats, tmp_path / "offloaded", offload_hidden_states=True))
    assert losses(tmp_path / "kept") == losses(tmp_path / "offloaded")


def test_without_torchao_its_optimizer_is_refused_before_anything_is_loaded(tmp_path, chats, monkeypatch):
    real = find_spec
    monkeypatch.setattr("octavo.train.base.find_spec", lambda name: None if name == "torchao" else real(name))
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[adamw8bit\]'"):
        train(**tree(tmp_path / "nothing", chats, tmp_path / "run", optimizer="adamw_8bit"))


@needs_torchao
@pytest.mark.slow
def test_bfloat16_adapters_with_8_bit_states_learn_and_resume(tmp_path, checkpoint):
    # One batch, again and again. Of a rank at which tensors are large enough for torchao to quantize their states.
    data = write_jsonl(tmp_path / "few.jsonl", [chat(index) for index in range(4)])

    def run(out, optimizer, dtype):
        config = tree(checkpoint, data, out, steps=12, optimizer=optimizer, lr=2e-2, save_every=6)
        config["lora"] |= {"dtype": dtype, "r": 64}
        return train(**config)

    out = tmp_path / "narrow"
    result = run(out, "adamw_8bit", "bfloat16")
    run(tmp_path / "wide", "adamw", "float32")
    found, wide = losses(out), losses(tmp_path / "wide")
    assert found[-1] < found[0] - 0.4
    assert found[-1] == pytest.approx(wide[-1], rel=0.03)
    adapter = load_file(result.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
    state = torch.load(out / "checkpoint-12" / "optimizer.pt", weights_only=False)
    assert any("OptimState8bit" in type(held["exp_avg"]).__name__ for held in state["state"].values())
    # As if the process had died: the second half is repeated, rounding included.
    (out / "checkpoint-12").rename(tmp_path / "lost")
    assert run(out, "adamw_8bit", "bfloat16").resumed_from == out / "checkpoint-6"
    assert losses(out) == found


def test_the_line_shows_the_peak_beside_its_plan(tmp_path, checkpoint, chats):
    config = parse_config(tree(checkpoint, chats, tmp_path / "run", optimizer="sgd"))
    plan = planned(config)
    model = octavo.load_model(checkpoint, dtype=torch.float32)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=4))
    assert plan.adapters == sum(p.numel() * 4 for p in tuned.parameters() if p.requires_grad)
    assert plan.optimizer == 0
    meter = Meter(tuned)
    assert "plan_gb" not in meter.read()
    meter.plan = 1_500_000_000
    line = record(1, {"loss": 1.0, **meter.read()})
    assert "planned 1.50 GB" in metrics_text(line)
    router = config.model_copy(update={"lora": config.lora.model_copy(update={"router": True})})
    with pytest.raises(OctavoError, match="routers"):
        planned(router)


def test_segments_grow_unless_a_person_said_otherwise(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    # Registered first, so that it is undone.
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"


def test_packed_name_is_registered_with_transformers(model):
    use_packed_attention(model)
    assert model.config._attn_implementation == PACKED
