"""On a GPU: packed attention by torch's variable-length kernel, and hidden states in pinned memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.trainer.utils import add_fused_lm_head

from octavo.train.offload import HiddenStatesOnHost
from octavo.train.packed import _takes_varlen, packed_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("empty", [0, 13], ids=["as_it_is", "examples_without_tokens"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(20, 20, 256), (32, 4, 128)], ids=["GLM-4.7-Flash", "Qwen3-30B-A3B"]
)
def test_packed_attention_is_attention_example_by_example(heads, kv_heads, width, empty):
    """With ``empty`` as `octavo.train.even_rows` tells where they begin, with the row's length for the longest."""
    lengths = [700, 1, 129, 1218]
    starts = torch.tensor([0, *lengths, *[0] * empty], device="cuda").cumsum(0).int()
    longest = sum(lengths) if empty else max(lengths)
    generator = torch.Generator("cuda").manual_seed(0)
    # As the model makes them: [B, S, heads, D], transposed.
    narrow = [
        torch.randn(1, sum(lengths), h, width, device="cuda", generator=generator).bfloat16().transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    for tensor in narrow:
        tensor.requires_grad_()
    assert _takes_varlen(narrow[0], narrow[2], 0.0)
    weights = torch.randn(1, sum(lengths), heads, width, device="cuda", generator=generator)
    got, _ = packed_attention(
        torch.nn.Module(), *narrow, None, scaling=0.07, cu_seq_lens_q=starts, max_length_q=longest
    )
    pieces, start = [], 0
    for length in lengths:
        part = [tensor[:, :, start : start + length] for tensor in wide]
        pieces.append(F.scaled_dot_product_attention(*part, is_causal=True, scale=0.07, enable_gqa=True))
        start += length
    want = torch.cat(pieces, 2).transpose(1, 2)
    (got.float() * weights).sum().backward()
    (want * weights).sum().backward()
    # bfloat16 keeps 8 bits; its flash kernel is about 4e-3 from float32 in norm, gradients about 6e-3
    for name, mine, theirs in [
        ("y", got, want),
        *((n, a.grad, b.grad) for n, a, b in zip("qkv", narrow, wide, strict=True)),
    ]:
        error = (mine.float() - theirs).norm() / theirs.norm()
        assert error < 1.5e-2, f"{name}: {error:.1e}"


def test_hidden_states_on_the_host_change_nothing_and_free_the_gpu():
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=1024, moe_intermediate_size=64, num_hidden_layers=24,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=list(range(24)),
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Qwen3MoeForCausalLM(config).bfloat16()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    add_fused_lm_head(model)
    tokens_BS = torch.randint(0, 512, (1, 8192), device="cuda")
    offload = HiddenStatesOnHost(model.parameters(), torch.device("cuda"))

    def step(*, offloaded: bool) -> tuple[torch.Tensor, int]:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if offloaded:
            with offload:
                loss = model(input_ids=tokens_BS, labels=tokens_BS, fused_lm_head=True).loss
            kept = torch.cuda.memory_allocated() - before
        else:
            loss = model(input_ids=tokens_BS, labels=tokens_BS, fused_lm_head=True).loss
            kept = torch.cuda.memory_allocated() - before
        loss.backward()
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
        model.zero_grad()
        torch.cuda.synchronize()
        return gradient, kept

    # the only attention whose gradient is the same from run to run on every card
    with sdpa_kernel(SDPBackend.MATH):
        want, resident = step(offloaded=False)
        for _ in range(3):
            got, left = step(offloaded=True)
            assert torch.equal(got, want)
    hidden = 8192 * 1024 * 2
    assert offload.bytes_offloaded >= 24 * hidden
    assert resident - left > 20 * hidden
