"""Compiled layers on a GPU: what a batch gives does not depend on the batches before it, to the last bit."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import octavo
from tests.gpu.device import DEVICE, needs_gpu
from tests.gpu.test_graphs import tuned
from tests.integrations.test_graph_layers import assert_equal

pytestmark = needs_gpu

LENGTHS = 600, 96


def computed(name: str, lengths: tuple[int, ...], shape: tuple[int, int] | None) -> dict[int, dict[str, Tensor]]:
    """The loss and the gradients of a batch of each length, one after the other, on a model that has met none."""
    torch._dynamo.reset()
    model = octavo.compile_layers(tuned(name), shape=shape)
    found = {}
    for length in lengths:
        model.zero_grad()
        tokens = torch.arange(2 * length, device=DEVICE).view(2, length) * 37 % 400
        # the only attention whose gradient is the same from run to run on every card
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
        gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
        found[length] = {"loss": loss.detach(), **gradients}
    return found


@pytest.mark.parametrize("shape", [None, (2, LENGTHS[0])], ids=str)
@pytest.mark.parametrize("name", ["glm-tiny", "qwen-tiny"])
def test_a_batch_is_rounded_alike_in_any_order(name: str, shape: tuple[int, int] | None) -> None:
    want, got = computed(name, LENGTHS, shape), computed(name, LENGTHS[::-1], shape)
    for length in LENGTHS:
        assert_equal(want[length], got[length])
