"""Recorded decoder layers of the real small models: the losses and gradients of gradient checkpointing, bit for bit.

On a CPU a recording is done again where a GPU would replay it, on the same buffers.
"""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import octavo
from octavo.errors import EngineError
from octavo.integrations import graphs, recorder
from octavo.integrations.graphs import graphs_state
from octavo.train.offload import HiddenStatesOnHost
from octavo.train.packed import use_packed_attention
from octavo.train.routing import ExpertTokens
from tests.integrations.test_compile_layers import step, tuned

EARLY, OTHERS = graphs._EARLY, graphs._OTHERS


class DoneAgain:
    """A recorder for machines without a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.kept_bytes = 0

    def warm(self, work: Callable[[], None]) -> None:
        before = torch.get_rng_state()
        work()
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise recorder.Unrecordable("it draws random numbers, as dropout does")

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setitem(recorder.RECORDERS, "cpu", DoneAgain)


def assert_equal(want: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def trained(model: nn.Module, steps: int, **options: object) -> list[dict[str, Tensor]]:
    """Steps with an optimizer, so that every one has other factors; tokens are the same."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        found.append(step(model, 12, **options))
        optimizer.step()
    return found


@pytest.mark.parametrize("options", [{}, {"output_router_logits": True}], ids=["plain", "router logits"])
@pytest.mark.parametrize(("name", "layers"), [("qwen-tiny", 3), ("glm-tiny", None)])
def test_losses_and_gradients_are_those_of_checkpointing(name, layers, options):
    want = trained(tuned(name, layers=layers), 5, **options)
    model = octavo.graph_layers(tuned(name, layers=layers))
    for one, other in zip(want, trained(model, 5, **options), strict=True):
        assert_equal(one, other)
    state = graphs_state(model)
    count = len(state.layers)
    assert state.recordings == count
    assert state.replayed == 3 * count
    assert state.unrecorded == {EARLY: 2 * count}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["non-reentrant", "reentrant"])
def test_under_autocast_with_hidden_states_on_the_host(checkpointing):
    """The hooks of offloading get every layer's input, as from a checkpoint."""

    def steps(model: nn.Module) -> tuple[list[dict[str, Tensor]], int]:
        offload = HiddenStatesOnHost(model.parameters(), torch.device("cpu"), min_bytes=1)
        found = []
        for _ in range(4):
            model.zero_grad()
            tokens = torch.arange(24).view(2, 12) * 37 % 400
            with torch.autocast("cpu", dtype=torch.bfloat16), offload:
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad})
            found[-1]["loss"] = loss.detach()
        return found, offload.bytes_offloaded

    want, offloaded = steps(tuned("qwen-tiny", layers=2, checkpointing=checkpointing))
    model = octavo.graph_layers(tuned("qwen-tiny", layers=2, checkpointing=checkpointing))
    got, now = steps(model)
    for one, other in zip(want, got, strict=True):
        assert_equal(one, other)
    assert graphs_state(model).replayed == 4
    assert now == offloaded


def test_backward_under_autocast_is_not_what_was_recorded(monkeypatch):
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        tokens = torch.arange(24).view(2, 12) * 37 % 400
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    want = gradients(tuned("qwen-tiny", layers=2))
    model = octavo.graph_layers(tuned("qwen-tiny", layers=2))
    for _ in range(4):
        assert_equal(want, gradients(model))
    assert graphs_state(model).replayed == 4


def test_two_forwards_before_their_backwards():
    """What is in the buffers is the second one's, so the first one's is put there again."""
    model = tuned("qwen-tiny", layers=2)
    batches = [torch.arange(24).view(2, 12) * factor % 400 for factor in (37, 41)]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        losses = [model(input_ids=tokens, labels=tokens, use_cache=False).loss for tokens in batches]
        for loss in losses:
            loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    want = gradients()
    octavo.graph_layers(model)
    for _ in range(3):
        assert_equal(want, gradients())
    assert graphs_state(model).replayed == 8


def test_padding_masks():
    """A mask is copied where it is another, and expanded ones have overlapping memory."""
    model = tuned("qwen-tiny", layers=2)

    def gradients(padded: int) -> dict[str, Tensor]:
        model.zero_grad()
        tokens = torch.arange(24).view(2, 12) * 37 % 400
        mask = torch.ones_like(tokens)
        mask[0, 12 - padded :] = 0
        model(input_ids=tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    want = [gradients(padded) for padded in (3, 5)]
    assert not torch.equal(*(next(iter(one.values())) for one in want))
    octavo.graph_layers(model)
    for _ in range(3):
        for padded, one in zip((3, 5), want, strict=True):
            assert_equal(one, gradients(padded))
    assert graphs_state(model).replayed == 8


def test_so_many_lengths_are_recorded_and_others_run_as_before(caplog):
    model = tuned("qwen-tiny", layers=2)
    lengths = range(8, 8 + graphs.LIMIT + 2)
    want = {length: step(model, length) for length in lengths}
    octavo.graph_layers(model)
    for length in lengths:
        for _ in range(3):
            assert_equal(want[length], step(model, length))
    state = graphs_state(model)
    assert state.recordings == 2 * graphs.LIMIT
    assert state.replayed == 2 * graphs.LIMIT
    assert state.unrecorded == {EARLY: 4 * graphs.LIMIT, OTHERS: 12}
    assert sum(OTHERS in record.message for record in caplog.records) == 1
    assert OTHERS in str(octavo.describe(model))


def test_weights_in_other_memory_are_recorded_anew():
    model = octavo.graph_layers(tuned("qwen-tiny", layers=2))
    for _ in range(3):
        want = step(model, 12)
    moved = next(p for key, p in model.named_parameters() if "layers.1" in key and "lora_A" in key)
    moved.data = moved.data.clone()
    for _ in range(3):
        assert_equal(want, step(model, 12))
    # layer 0 goes on; layer 1 begins again
    state = graphs_state(model)
    assert state.recordings == 2
    assert state.unrecorded == {EARLY: 4 + 2}
    assert state.replayed == 2 + 3 + 1


def test_settings_are_recorded_anew():
    model = tuned("qwen-tiny", layers=2)
    want = step(model, 12)
    octavo.graph_layers(model)
    for _ in range(3):
        step(model, 12)
    octavo.configure(model, numerics="fp8")
    other = step(model, 12)
    assert not torch.equal(other["loss"], want["loss"])
    step(model, 12)
    assert_equal(other, step(model, 12))
    octavo.configure(model, numerics="exact")
    for _ in range(3):
        assert_equal(want, step(model, 12))
    assert graphs_state(model).replayed == 6


def test_packed_rows():
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        tokens = torch.arange(12)[None] * 37 % 400
        starts = torch.tensor([0, 5, 12], dtype=torch.int32)
        options = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
        positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
        model(input_ids=tokens, labels=tokens, position_ids=positions, use_cache=False, **options).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}

    model = tuned("qwen-tiny", layers=2)
    use_packed_attention(model.base_model.model)
    want = gradients(model)
    octavo.graph_layers(model)
    for _ in range(4):
        assert_equal(want, gradients(model))
    assert graphs_state(model).replayed == 4


def test_tokens_of_experts_are_counted(request):
    model = tuned("qwen-tiny", layers=3)
    counter = ExpertTokens(model, padding=True)
    request.addfinalizer(counter.close)

    def shares() -> list[Tensor]:
        step(model, 12)
        found = [count / count.sum() for count in counter.counts.values()]
        counter.reset()
        return found

    want = shares()
    octavo.graph_layers(model)
    for _ in range(4):
        for share, got in zip(want, shares(), strict=True):
            torch.testing.assert_close(got, share)
    assert graphs_state(model).replayed == 6


def test_compiled_layers_are_recorded():
    torch._dynamo.reset()
    model = octavo.compile_layers(tuned("qwen-tiny", layers=2), backend="aot_eager")
    want = trained(model, 4, output_router_logits=True)
    model = octavo.compile_layers(octavo.graph_layers(tuned("qwen-tiny", layers=2)), backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for one, other in zip(want, trained(model, 4, output_router_logits=True), strict=True):
        assert_equal(one, other)
    assert graphs_state(model).replayed == 4
    # a recording runs what the forwards before it compiled
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    octavo.compile_layers(model, on=False)
    assert graphs_state(model).recordings == 0
    assert len(graphs_state(model).layers) == 2


def reasons(model: nn.Module) -> set[str]:
    for _ in range(4):
        step(model, 12)
    state = graphs_state(model)
    assert not state.replayed
    return set(state.unrecorded) - {EARLY}


def test_what_is_not_recorded_is_said():
    (reason,) = reasons(octavo.graph_layers(tuned("qwen-tiny", layers=2, checkpointing=None)))
    assert "gradient checkpointing is off" in reason
    model = octavo.graph_layers(tuned("qwen-tiny", layers=2))
    for layer in model.base_model.model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: None)
    assert reasons(model) == {"a hook inside the layer may change what it sees"}
    model = octavo.graph_layers(tuned("qwen-tiny", layers=2))
    for layer in model.base_model.model.model.layers:
        layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert reasons(model) == {"there is a hook on the layer itself"}


def test_dropout_is_not_recorded_and_draws_as_before():
    def dropped() -> nn.Module:
        model = tuned("qwen-tiny", layers=2)
        for module in model.modules():
            for name in getattr(module, "lora_dropout", {}):
                module.lora_dropout[name] = nn.Dropout(0.5)
        return model

    plain, model = dropped(), octavo.graph_layers(dropped())
    torch.manual_seed(1)
    want = [step(plain, 12) for _ in range(5)]
    assert not torch.equal(want[0]["loss"], want[1]["loss"])
    torch.manual_seed(1)
    for one in want:
        assert_equal(one, step(model, 12))
    (reason,) = reasons(model)
    assert "draws random numbers" in reason


def test_a_layer_that_cannot_be_recorded_leaves_the_others(monkeypatch):
    model = tuned("qwen-tiny", layers=3)
    want = step(model, 12)
    octavo.graph_layers(model)
    asked = []

    def refuses_the_second(self: object, work: Callable[[], None]) -> None:
        asked.append(work)
        if len(asked) == 2:
            raise recorder.Unrecordable("it waits for the GPU")
        work()

    monkeypatch.setattr(DoneAgain, "warm", refuses_the_second)
    for _ in range(4):
        assert_equal(want, step(model, 12))
    assert len(asked) == 3
    state = graphs_state(model)
    assert state.recordings == 2
    assert state.replayed == 4
    assert state.unrecorded == {EARLY: 6, "it waits for the GPU": 2}


def test_an_error_of_torch_leaves_the_layer_as_before(monkeypatch):
    def fails(self: object, work: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    monkeypatch.setattr(DoneAgain, "record", fails)
    model = tuned("qwen-tiny", layers=2)
    want = step(model, 12)
    octavo.graph_layers(model)
    assert reasons(model) == {"recording it failed: operation not permitted when stream is capturing"}
    assert_equal(want, step(model, 12))


def test_evaluation_and_generation_are_as_before():
    model = tuned("qwen-tiny", layers=2).eval()
    tokens = torch.arange(6)[None]
    want = model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False)
    octavo.graph_layers(model)
    assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False), want)
    assert not graphs_state(model).unrecorded


@pytest.mark.parametrize("first", ["graphs", "compiled"])
def test_off_is_as_before(first):
    model = tuned("glm-tiny")
    classes = [type(module) for module in model.modules()]
    both = [octavo.graph_layers, octavo.compile_layers]
    for turn in both if first == "graphs" else both[::-1]:
        turn(model)
    assert "layers 0-4 replay CUDA graphs" in str(octavo.describe(model))
    octavo.graph_layers(model, on=False)
    assert "CUDA graphs" not in str(octavo.describe(model))
    assert "layers 0-4 run as compiled" in str(octavo.describe(model))
    octavo.compile_layers(model, on=False)
    assert [type(module) for module in model.modules()] == classes


def test_a_model_off_the_gpu_is_refused(monkeypatch):
    monkeypatch.delitem(recorder.RECORDERS, "cpu")
    with pytest.raises(EngineError, match="CUDA graphs need a GPU"):
        octavo.graph_layers(tuned("qwen-tiny", layers=1))
    with pytest.raises(EngineError, match="Linear has no decoder layer"):
        octavo.graph_layers(nn.Linear(2, 2))


class _Made(TorchDispatchMode):
    """Memory that operators gave results in, other than their arguments'."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, StorageWeakRef]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made.append((str(func), StorageWeakRef(tensor.untyped_storage())))
        return result


@pytest.mark.parametrize("name", ["glm-tiny", "qwen-tiny"])
def test_nothing_of_a_recording_outlives_it(name, monkeypatch):
    """All recordings share one layer's memory, so what is alive at the end of one is memory for good."""
    left: list[str] = []

    class Watching(DoneAgain):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            with _Made() as watch:
                work()
            gc.collect()
            left.extend(name for name, storage in watch.made if not storage.expired())
            assert len(watch.made) > 100
            return work

    monkeypatch.setitem(recorder.RECORDERS, "cpu", Watching)
    model = octavo.graph_layers(tuned(name))
    trained(model, 3)
    state = graphs_state(model)
    assert state is not None
    assert state.recordings > 0
    assert not left


def test_recordings_that_keep_memory_are_stopped(monkeypatch, caplog):
    """The layers recorded by then stay so, the others run as before, and why is said."""

    class Leaks(DoneAgain):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            self.kept_bytes += 50 << 20
            return work

    monkeypatch.setitem(recorder.RECORDERS, "cpu", Leaks)
    want = trained(tuned("qwen-tiny", layers=3), 4)
    model = octavo.graph_layers(tuned("qwen-tiny", layers=3))
    for one, other in zip(want, trained(model, 4), strict=True):
        assert_equal(one, other)
    state = graphs_state(model)
    reason = "recordings kept 0.10 GB that they should have given back"
    assert (state.recordings, state.unrecorded[reason]) == (1, 4)
    assert f"No more decoder layers are recorded as CUDA graphs: {reason}" in caplog.text
