"""On a GPU: experts in pinned host memory give the bits of resident ones, however late copies or products are."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo import demo
from octavo.errors import EngineError
from octavo.ops.ring import HostRing, _Copies, _Slot
from tests.gpu.device import DEVICE, needs_gpu
from tests.gpu.test_graphs import trained, tuned
from tests.integrations.test_graph_layers import assert_equal
from tests.integrations.test_host_experts import hosted, rings

pytestmark = needs_gpu

# Some 10 ms, which is more than a layer of these takes.
CYCLES = 20_000_000
STEPS = 3


def late_copies(patch: pytest.MonkeyPatch) -> None:
    """A product that does not wait for its copy reads another layer's codes."""
    fill = _Copies.fill

    def late(self: _Copies, slot: _Slot, sources: Sequence[Tensor]) -> None:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(CYCLES)
        fill(self, slot, sources)

    patch.setattr(_Copies, "fill", late)


def late_products(patch: pytest.MonkeyPatch) -> None:
    """A copy that does not wait for the products before it gives them its codes."""
    taken = HostRing.taken

    @contextmanager
    def late(self: HostRing, layer: int, device: torch.device) -> Iterator[list[Tensor]]:
        with taken(self, layer, device) as views:
            torch.cuda._sleep(CYCLES)
            yield views

    patch.setattr(HostRing, "taken", late)


def as_they_are(patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize("how", [as_they_are, late_copies, late_products])
@pytest.mark.parametrize("name", ["glm-tiny", "qwen-tiny"])
def test_losses_and_gradients_are_those_of_resident_experts(name, how, monkeypatch):
    want = trained(tuned(name, "resident"), STEPS)
    model = tuned(name, "host")
    how(monkeypatch)
    for one, other in zip(want, trained(model, STEPS), strict=True):
        assert_equal(one, other)
    (ring,) = rings(model)
    assert ring.copied > 0
    assert {buffer.device for buffer in ring.buffers} == {DEVICE}
    factors = [parameter for key, parameter in model.named_parameters() if "lora" in key]
    assert {parameter.device for parameter in factors} == {DEVICE}


def test_compiled_layers_stream_too():
    want = trained(octavo.compile_layers(tuned("qwen-tiny", "resident")), STEPS)
    model = octavo.compile_layers(tuned("qwen-tiny", "host"))
    for one, other in zip(want, trained(model, STEPS), strict=True):
        assert_equal(one, other)
    assert all(ring.copied for ring in rings(model))


def test_codes_are_pinned_and_not_on_the_gpu():
    def held(experts: str) -> tuple[int, nn.Module]:
        gc.collect()
        before = torch.cuda.memory_allocated()
        model = octavo.load_model(demo.checkpoint("qwen-tiny"), experts=experts, device_map=DEVICE)  # type: ignore[arg-type]
        return torch.cuda.memory_allocated() - before, model

    resident, _ = held("resident")
    there, model = held("host")
    streamed = [part.get_parameter(name) for part in hosted(model) for name in part.streamed_names]
    assert all(parameter.is_pinned() for parameter in streamed)
    assert resident - there >= sum(parameter.nbytes for parameter in streamed)


def test_they_cannot_be_captured():
    model = octavo.load_model(demo.checkpoint("qwen-tiny"), experts="host", device_map=DEVICE).eval()
    (experts, *_) = hosted(model)
    (ring,) = rings(model)
    layer = experts.get_parameter(experts.streamed_names[0]).data_ptr()
    with (
        pytest.raises(EngineError, match="cannot be captured"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        ring.taken(layer, DEVICE),
    ):
        pass
