"""``experts="host"`` on the real small models: bit for bit what resident experts give, through a ring of any size."""

import contextlib
import copy
import gc
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import octavo
from octavo import demo
from octavo.errors import EngineError
from octavo.integrations import recorder
from octavo.integrations.generation import why_no_graphs
from octavo.integrations.graphs import graphs_state
from octavo.nn import host
from octavo.nn.experts import Float8Experts
from octavo.ops.ring import HostRing, _PlainCopies, _Slot
from octavo.train.offload import HiddenStatesOnHost
from tests.curves import dequantized
from tests.integrations.test_graph_layers import DoneAgain

STEPS = 3
CODE_OF_NAN = 0x7F


def loaded(experts: str, name: str = "glm-tiny", *, num_slots: int = 2, **how: object) -> nn.Module:
    model = octavo.load_model(demo.checkpoint(name), experts=experts, dtype=torch.float32, **how)  # type: ignore[arg-type]
    for ring in rings(model):
        ring.num_slots = num_slots
    return model


def hosted(model: nn.Module) -> list[Float8Experts]:
    return [part for part in model.modules() if isinstance(part, Float8Experts)]


def rings(model: nn.Module) -> set[HostRing]:
    return {part.ring for part in hosted(model) if part.ring is not None}


def tuned(model: nn.Module, checkpointing: bool | None) -> nn.Module:
    """Under LoRA on everything; ``checkpointing``: reentrant or not, ``None`` for without."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, octavo.lora_config(model, r=4))  # type: ignore[arg-type]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})  # type: ignore[operator]
        model.enable_input_require_grads()  # type: ignore[operator]
    return adapted.train()


def trained(model: nn.Module, *, offload: bool = False) -> dict[str, Tensor]:
    """Losses and gradients of every step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    states = HiddenStatesOnHost(model.parameters(), torch.device("cpu"), min_bytes=1) if offload else None
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        ids = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(step))
        with states or contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        found[f"{step} loss"] = loss.detach()
        found |= {f"{step} {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return found


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is released is gone at once: whoever kept a view of its buffer goes on with NaN."""
    taken = HostRing.taken

    @contextlib.contextmanager
    def and_gone(self: HostRing, layer: int, device: torch.device) -> Iterator[list[Tensor]]:
        with taken(self, layer, device) as views:
            yield views
        for slot in self._slots:
            if slot.layer == layer:
                slot.buffer.fill_(CODE_OF_NAN)
                slot.layer = None

    monkeypatch.setattr(HostRing, "taken", and_gone)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy arrives when somebody waits for it, and the buffer is NaN until then."""
    coming: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def fill(self: _PlainCopies, slot: _Slot, sources: Sequence[Tensor]) -> None:
        assert slot.users == 0
        slot.buffer.fill_(CODE_OF_NAN)
        coming[id(slot)] = list(zip(slot.views, sources, strict=True))

    def wait(self: _PlainCopies, slot: _Slot) -> None:
        for place, source in coming.pop(id(slot), []):
            place.copy_(source)

    monkeypatch.setattr(_PlainCopies, "fill", fill)
    monkeypatch.setattr(_PlainCopies, "wait", wait)


@pytest.fixture(scope="module")
def resident() -> Callable[[str, bool | None], dict[str, Tensor]]:
    return cache(lambda name, checkpointing: trained(tuned(loaded("resident", name), checkpointing)))


@pytest.mark.parametrize("num_slots", [2, 3])
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("name", ["qwen-tiny", "glm-tiny"])
def test_losses_and_gradients_are_those_of_resident_experts(resident, name, checkpointing, num_slots):
    """In glm-tiny layers with unquantized experts, which are resident, lie in between."""
    model = loaded("host", name, num_slots=num_slots)
    assert_equal(trained(tuned(model, checkpointing)), resident(name, checkpointing))
    (ring,) = rings(model)
    assert len(ring.buffers) == num_slots


@pytest.mark.parametrize("checkpointing", [None, False], ids=["kept", "non-reentrant"])
def test_buffers_may_be_overwritten_once_released(poisoned, resident, checkpointing):
    assert_equal(trained(tuned(loaded("host"), checkpointing)), resident("glm-tiny", checkpointing))


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("checkpointing", [None, False], ids=["kept", "non-reentrant"])
def test_copies_may_be_late(resident, late, checkpointing, num_slots):
    model = loaded("host", num_slots=num_slots)
    assert_equal(trained(tuned(model, checkpointing)), resident("glm-tiny", checkpointing))


def test_it_combines_with_hidden_states_on_the_host(resident):
    assert_equal(trained(tuned(loaded("host"), False), offload=True), resident("glm-tiny", False))


def test_activations_in_fp8_are_the_same():
    want = trained(tuned(loaded("resident", activations="fp8"), None))
    assert_equal(trained(tuned(loaded("host", activations="fp8"), None)), want)


def test_layers_are_copied_once_a_pass_and_ahead_of_use(monkeypatch: pytest.MonkeyPatch):
    """Recomputation and gradient share a copy, both turns find their layers, and no layer waits for its own copy."""
    model = loaded("host", "qwen-tiny")
    (ring,) = rings(model)
    adapted = tuned(model, False)
    trained(adapted)
    before, addresses = ring.copied, [buffer.data_ptr() for buffer in ring.buffers]
    asked, late = [], []
    take, fetch = HostRing._take, HostRing._fetch
    monkeypatch.setattr(HostRing, "_take", lambda self, *what: (asked.append(what[0]), take(self, *what))[1])
    monkeypatch.setattr(
        HostRing, "_fetch", lambda self, layer: (late.append(layer == asked[-1]), fetch(self, layer))[1]
    )
    trained(adapted)
    # forward and backward pass every layer, and two are there at each turn
    num_layers = len(hosted(model))
    assert num_layers > 3
    assert ring.copied - before == len(late) == STEPS * 2 * (num_layers - 2)
    assert not any(late)
    # forward, and twice in backward
    assert len(asked) == STEPS * 3 * num_layers
    assert [buffer.data_ptr() for buffer in ring.buffers] == addresses


def test_compiled_layers_stream_too():
    torch._dynamo.reset()
    want = trained(octavo.compile_layers(tuned(loaded("resident", "qwen-tiny"), False), backend="aot_eager"))
    torch._dynamo.reset()
    model = loaded("host", "qwen-tiny")
    got = trained(octavo.compile_layers(tuned(model, False), backend="aot_eager"))
    assert_equal(got, want)
    assert all(ring.copied for ring in rings(model))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_graphs_leave_these_layers_out(monkeypatch: pytest.MonkeyPatch, resident):
    """On a CPU a recording is done again where a GPU would replay it."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", DoneAgain)
    model = octavo.graph_layers(tuned(loaded("host", "qwen-tiny"), False))
    assert_equal(trained(model), resident("qwen-tiny", False))
    state = graphs_state(model)
    assert state is not None
    assert (state.recordings, state.replayed) == (0, 0)
    assert any("host memory" in reason for reason in state.unrecorded)
    assert "host memory" in str(octavo.describe(model))


def test_generation_is_the_same():
    ids = torch.arange(2, 14)[None]
    want, got = (
        octavo.generate(loaded(experts).eval(), input_ids=ids, max_new_tokens=8, do_sample=False)
        for experts in ("resident", "host")
    )
    assert torch.equal(got, want)
    reason = why_no_graphs(loaded("host"))
    assert "host memory" in str(reason)


def test_what_is_saved_is_byte_equal(tmp_path: Path):
    for experts in ("resident", "host"):
        model = loaded(experts)
        if experts == "host":
            trained(tuned(model, None))
            model = loaded(experts)
        model.save_pretrained(tmp_path / experts)
    names = sorted(file.name for file in (tmp_path / "resident").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "host").iterdir())
    for name in names:
        digests = {
            hashlib.sha256((tmp_path / experts / name).read_bytes()).digest() for experts in ("resident", "host")
        }
        assert len(digests) == 1, name


def test_codes_stay_when_the_model_moves():
    model = loaded("host")
    before = {name: getattr(part, name).data_ptr() for part in hosted(model) for name in part.streamed_names}
    model.to(torch.bfloat16)
    # as a move to another device does, without one
    model._apply(lambda tensor: tensor.clone())
    after = {name: getattr(part, name).data_ptr() for part in hosted(model) for name in part.streamed_names}
    assert after == before
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_a_changed_code_is_copied_again():
    model = loaded("host").eval()
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        model(input_ids=ids)
        before = model(input_ids=ids).logits
        # by now the ring has fetched the first layer for the next pass
        hosted(model)[0].down_proj.zero_()
        changed = model(input_ids=ids).logits
    other = loaded("resident").eval()
    with torch.no_grad():
        hosted(other)[0].down_proj.zero_()
        assert torch.equal(changed, other(input_ids=ids).logits)
    assert not torch.equal(changed, before)


def test_host_memory_is_not_given_up_while_it_is_copied(monkeypatch: pytest.MonkeyPatch):
    model = loaded("host").eval()
    codes = weakref.ref(hosted(model)[0].down_proj)
    there = []
    monkeypatch.setattr(_PlainCopies, "synchronize", lambda self: there.append(codes() is not None))
    with torch.no_grad():
        model(input_ids=torch.arange(2, 14)[None])
    assert not there
    del model
    gc.collect()
    assert there == [True]
    assert codes() is None


def test_it_shows():
    model = loaded("host")
    rows = {row.storage for row in octavo.describe(model).rows if row.module.endswith("experts")}
    assert any(storage.endswith("in host memory") for storage in rows)
    assert "in host memory" in repr(hosted(model)[0])
    assert "in host memory" not in str(octavo.describe(loaded("resident")))


def test_the_loader_reserves_nothing_for_them(monkeypatch: pytest.MonkeyPatch):
    sizes: dict[str, float] = {}

    def finished(self, model: nn.Module, **_: object) -> object:
        for name, parameter in model.named_parameters():
            sizes[name] = self.param_element_size(model, name, parameter)
        return process(self, model)

    from octavo.integrations.quantizer import OctavoQuantizer

    process = OctavoQuantizer._process_model_after_weight_loading
    monkeypatch.setattr(OctavoQuantizer, "_process_model_after_weight_loading", finished)
    # all tensors of this model are small
    monkeypatch.setattr("octavo.integrations.quantizer._SMALL_BYTES", 0)
    model = loaded("host")
    names = {
        f"{name}.{streamed}"
        for name, part in model.named_modules()
        if isinstance(part, Float8Experts)
        for streamed in part.streamed_names
    }
    assert names
    assert {name for name, size in sizes.items() if size == 0} == names


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(EngineError, match="is none of resident, host"):
        loaded("disk")
    plain = dequantized(demo.checkpoint("qwen-tiny"), tmp_path / "plain")
    with pytest.raises(EngineError, match="holds no FP8 weights"):
        octavo.load_model(plain, experts="host")
    with pytest.raises(EngineError, match="has none in this checkpoint"):
        loaded("host", "dense-tiny")
    with pytest.raises(EngineError, match="device_map spreads the model"):
        loaded("host", device_map="auto")
    with pytest.raises(EngineError, match="cannot be copied"):
        copy.deepcopy(loaded("host"))
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    with pytest.raises(EngineError, match=r"0\.0 GB are available"):
        loaded("host")
