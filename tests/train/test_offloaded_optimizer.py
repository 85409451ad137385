"""Optimizer states in host memory: the same bits, few of them on the device, and checkpoints for both ways."""

import gc
import io
import weakref
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.optim import SGD, AdamW, Optimizer
from transformers import Adafactor

from octavo.errors import ConfigError, EngineError
from octavo.nn import host
from octavo.nn.host import HostMemory
from octavo.ops.pieces import IN_FLIGHT, Wait, leaves
from octavo.train.metrics import read_metrics
from octavo.train.offloaded_optimizer import OffloadedOptimizer, OffloadsOptimizer, offloaded

from . import grpo_runs
from .tiny import chat, train, tree, write_jsonl

CPU = torch.device("cpu")
SHAPES = [(64, 128), (4, 32), (128, 64), (7,), (96, 64), (300,), (2, 64, 32), ()]
NAMES = ["adamw", "adamw, one kernel each", "adafactor", "sgd with momentum", "adamw_8bit"]


def parameters(name: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if name == "adamw_8bit" else torch.float32
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[2] = made[2].T
    return [nn.Parameter(tensor.to(dtype)) for tensor in made]


def optimizer_of(name: str, of: Sequence[nn.Parameter]) -> Optimizer:
    """Over two groups, as transformers makes them."""
    groups = [{"params": of[::2], "weight_decay": 0.1}, {"params": of[1::2], "weight_decay": 0.0}]
    if name == "adamw":
        return AdamW(groups, lr=1e-2, fused=True)
    if name == "adamw, one kernel each":
        return AdamW(groups, lr=1e-2, foreach=False)
    if name == "adafactor":
        return Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)
    if name == "sgd with momentum":
        return SGD(groups, lr=1e-2, momentum=0.9)
    from torchao.optim import AdamW8bit

    return AdamW8bit(groups, lr=1e-2, bf16_stochastic_round=True)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "adamw_8bit":
        yield request.param
        return
    if find_spec("torchao") is None:
        pytest.skip("torchao is optional")
    # It compiles its step, which takes a minute and changes nothing of what is tested.
    torch.compiler.set_stance("force_eager")
    yield request.param
    torch.compiler.set_stance("default")


class LateCopies:
    """Copies as late as the device may do them: NaN is what is used before a wait, what was let go of, and what the
    host reads before it has synchronized.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.most = 0
        # Addresses of host memory that is written, and what has arrived there that the host does not see yet.
        self._pending: set[int] = set()
        self._unseen: dict[int, tuple[Tensor, Tensor]] = {}
        self._there: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def fetch(self, hosts: Sequence[Tensor]) -> tuple[list[Tensor], Wait]:
        assert not self._pending & {host.data_ptr() for host in hosts}, "fetched while it is still being written"
        tensors = [torch.empty_strided(h.shape, h.stride(), dtype=h.dtype) for h in hosts]
        self.log.append("fetch")
        for tensor in tensors:
            poison(tensor)
        self._note(tensors)

        def wait() -> None:
            self.log.append("wait")
            for tensor, place in zip(tensors, hosts, strict=True):
                tensor.copy_(self._unseen.get(place.data_ptr(), (place, place))[1])

        return tensors, wait

    def write(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> Wait:
        self.log.append("write")
        self._note(tensors)
        sources = list(tensors)
        self._pending |= {host.data_ptr() for host in hosts}
        for place in hosts:
            poison(place)

        def wait() -> None:
            for source, place in zip(sources, hosts, strict=True):
                self._unseen[place.data_ptr()] = (place, source.clone())
                poison(source)
            self._pending -= {host.data_ptr() for host in hosts}
            sources.clear()

        return wait

    def synchronize(self) -> None:
        assert not self._pending
        for place, value in self._unseen.values():
            place.copy_(value)
        self._unseen.clear()

    @property
    def there(self) -> int:
        """Bytes of states on the device."""
        return sum(nbytes for ref, nbytes in self._there.values() if ref() is not None)

    def _note(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            self._there[tensor.data_ptr()] = (weakref.ref(tensor), tensor.nbytes)
        self.most = max(self.most, self.there)


def poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else 255)


def step(optimizer: Optimizer, of: Sequence[nn.Parameter], number: int, *, without: int | None = None) -> None:
    """Gradients of two backward passes, clipped, and a step."""
    generator = torch.Generator().manual_seed(number)
    for _ in range(2):
        for index, parameter in enumerate(of):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if index != without:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    nn.utils.clip_grad_norm_(of, 1.0)
    # Stochastic rounding draws from it.
    torch.manual_seed(number)
    optimizer.step()
    optimizer.zero_grad()


def on_host(optimizer: Optimizer, piece_bytes: int, copies: LateCopies) -> OffloadedOptimizer:
    memory = HostMemory(CPU, [], asked="a test", contents="states", otherwise="do without")
    return OffloadedOptimizer(optimizer, memory, piece_bytes=piece_bytes, copies=copies)


def tensors_of(optimizer: Optimizer) -> list[Any]:
    """Every state, in order; tensors as the plain ones that they are made of."""
    found: list[Any] = []
    for states in optimizer.state_dict()["state"].values():
        for key, value in states.items():
            found += [key, *(leaves(value) if isinstance(value, Tensor) else [value])]
    return found


def assert_same(got: Sequence[Any], want: Sequence[Any]) -> None:
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        if isinstance(theirs, Tensor):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        else:
            assert mine == theirs


@pytest.mark.parametrize("piece_bytes", [1, 60_000, 1 << 30], ids=["a parameter each", "some", "a group each"])
def test_results_are_the_same_to_the_bit_and_few_states_are_there(name, piece_bytes):
    want, got, copies = parameters(name), parameters(name), LateCopies()
    resident, streamed = optimizer_of(name, want), on_host(optimizer_of(name, got), piece_bytes, copies)
    for number in range(4):
        # One that gets its first gradient late, and one that gets none in between.
        without = {0: 4, 2: 1}.get(number)
        step(resident, want, number, without=without)
        step(streamed, got, number, without=without)
        assert_same(got, want)
        assert copies.there == 0
    assert_same(tensors_of(streamed), tensors_of(resident))
    total = sum(value.nbytes for value in tensors_of(resident) if isinstance(value, Tensor) and value.ndim > 0)
    largest = max(streamed._nbytes.values())
    assert streamed.host_bytes == total
    assert 0 < copies.most <= min(total, IN_FLIGHT * max(piece_bytes, largest))
    if piece_bytes == 1:
        assert copies.most < total


def test_the_next_piece_comes_while_one_is_updated_and_another_leaves():
    of, copies = parameters("adamw"), LateCopies()
    streamed = on_host(optimizer_of("adamw", of), 1, copies)
    step(streamed, of, 0)
    copies.log.clear()
    inner = streamed._inner.step
    streamed._inner.step = lambda: (copies.log.append("update"), inner())[1]  # type: ignore[method-assign]
    step(streamed, of, 1)
    want = ["fetch", *["fetch", "wait", "update", "write"] * (len(SHAPES) - 1), "wait", "update", "write"]
    # A number's states stay where they are: its piece has no tensors, and comes and goes all the same.
    assert copies.log == want


@pytest.mark.parametrize("after", ["on host", "resident"])
@pytest.mark.parametrize("before", ["on host", "resident"])
def test_a_checkpoint_of_either_goes_on_in_both(name, before, after):
    def made(kind: str, of: Sequence[nn.Parameter]) -> Optimizer:
        optimizer = optimizer_of(name, of)
        return on_host(optimizer, 60_000, LateCopies()) if kind == "on host" else optimizer

    want = parameters(name)
    resident = optimizer_of(name, want)
    for number in range(4):
        step(resident, want, number)
    of = parameters(name)
    optimizer = made(before, of)
    for number in range(2):
        step(optimizer, of, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    optimizer = made(after, of)
    if after == "on host":
        # What it had before is forgotten.
        values = [parameter.detach().clone() for parameter in of]
        step(optimizer, of, 9)
        for parameter, value in zip(of, values, strict=True):
            parameter.data.copy_(value)
    optimizer.load_state_dict(loaded)
    for number in range(2, 4):
        step(optimizer, of, number)
    assert_same(of, want)
    assert_same(tensors_of(optimizer), tensors_of(resident))


def test_states_are_loaded_in_the_dtype_of_their_parameter():
    narrow = [nn.Parameter(parameter.detach().bfloat16()) for parameter in parameters("adamw")]
    narrow_optimizer = optimizer_of("adamw", narrow)
    step(narrow_optimizer, narrow, 0)
    want, got = parameters("adamw"), parameters("adamw")
    resident, streamed = optimizer_of("adamw", want), on_host(optimizer_of("adamw", got), 1, LateCopies())
    for optimizer in (resident, streamed):
        optimizer.load_state_dict(narrow_optimizer.state_dict())
    assert_same(tensors_of(streamed), tensors_of(resident))


def test_a_checkpoint_takes_no_more_room():
    sizes = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: offloaded(optimizer, "adamw")):
        of = parameters("adamw")
        optimizer = wrap(optimizer_of("adamw", of))
        step(optimizer, of, 0)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        sizes.append(len(file.getvalue()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_an_optimizer_with_states_is_taken_over():
    want, got = parameters("adamw"), parameters("adamw")
    resident, streamed = optimizer_of("adamw", want), optimizer_of("adamw", got)
    for number in range(3):
        step(resident, want, number)
        step(streamed, got, number)
        if number == 0:
            streamed = on_host(streamed, 1, LateCopies())
            assert streamed.host_bytes == 2 * sum(parameter.nbytes for parameter in got if parameter.ndim > 0)
        held, kept = ([v for s in each.state.values() for v in s.values()] for each in (streamed, resident))
        assert_same(held, kept)
    assert_same(got, want)


def test_host_memory_is_not_given_up_before_copies_have_arrived():
    of = parameters("adamw")
    streamed = on_host(optimizer_of("adamw", of), 1, LateCopies())
    step(streamed, of, 0)
    held = [leaf for by_key in streamed._hosts.values() for each in by_key.values() for leaf in each]
    assert all(leaf.isnan().all() for leaf in held)
    del streamed
    gc.collect()
    assert not any(leaf.isnan().any() for leaf in held)


def test_schedulers_and_closures_find_what_they_need():
    want, got = parameters("adamw"), parameters("adamw")
    for of, optimizer in [
        (want, optimizer_of("adamw", want)),
        (got, on_host(optimizer_of("adamw", got), 1, LateCopies())),
    ]:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)

        def closure(of: Sequence[nn.Parameter] = of) -> Tensor:
            loss = sum(parameter.square().sum() for parameter in of)
            loss.backward()
            return loss

        for _ in range(3):
            assert optimizer.step(closure) > 0
            scheduler.step()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 1e-2 / 8
        assert all(parameter.grad is None for parameter in of)
    assert_same(got, want)


def test_a_step_that_fails_leaves_the_states_of_before():
    of = parameters("adamw")
    copies = LateCopies()
    streamed = on_host(optimizer_of("adamw", of), 1, copies)
    step(streamed, of, 0)
    before = [value.clone() if isinstance(value, Tensor) else value for value in tensors_of(streamed)]
    groups = [list(group["params"]) for group in streamed.param_groups]
    inner, streamed._inner.step = streamed._inner.step, lambda: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        step(streamed, of, 1)
    assert copies.there == 0
    # Memory that copies still arrive in is not given up.
    assert copies.log.count("fetch") == copies.log.count("wait")
    assert_same(tensors_of(streamed), before)
    assert [[id(p) for p in group["params"]] for group in streamed.param_groups] == [[id(p) for p in g] for g in groups]
    streamed._inner.step = inner  # type: ignore[method-assign]
    for parameter in of:
        parameter.grad = None
    step(streamed, of, 1)
    want = parameters("adamw")
    resident = optimizer_of("adamw", want)
    for number in range(2):
        step(resident, want, number)
    assert_same(of, want)


def test_what_cannot_be_streamed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spread = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4, device="meta"))]
    with pytest.raises(ConfigError, match="on cpu and meta"):
        offloaded(AdamW(spread), "adamw")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(ConfigError, match=r"one of shape \(4, 4\) is sharded"):
            offloaded(AdamW([nn.Parameter(sharded)]), "adamw")
    finally:
        dist.destroy_process_group()
    monkeypatch.setattr(host, "available_bytes", lambda: 1000)
    with pytest.raises(EngineError, match=r"`train\.offload_optimizer` needs .* the optimizer's states, and 0\.0 GB"):
        offloaded(AdamW([nn.Parameter(torch.zeros(1000))]), "adamw")


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Optimizer]:
    """What runs have made of their optimizers."""
    found: list[Optimizer] = []
    create = OffloadsOptimizer.create_optimizer

    def creating(self: OffloadsOptimizer, *args: Any, **kwargs: Any) -> Optimizer:
        found.append(create(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(OffloadsOptimizer, "create_optimizer", creating)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_run_has_the_same_losses_and_resumes_either_way(tmp_path, checkpoint, chats, made, optimizer):
    def run(out: Path, offload: bool) -> None:
        settings = {"optimizer": optimizer, "offload_optimizer": offload, "save_every": 2, "steps": 4}
        result = train(**tree(checkpoint, chats, out, grad_accumulation=2, batch_size=2, weight_decay=0.1, **settings))
        assert result.step == 4

    run(tmp_path / "resident", False)
    run(tmp_path / "on host", True)
    want = losses(tmp_path / "resident")
    assert losses(tmp_path / "on host") == want
    assert [isinstance(one, OffloadedOptimizer) for one in made] == [False, True]
    assert made[1].host_bytes > 0
    # As if the process had died, and someone else had gone on the other way.
    for before, offload in [("resident", True), ("on host", False)]:
        (tmp_path / before / "checkpoint-4").rename(tmp_path / f"lost of {before}")
        run(tmp_path / before, offload)
        assert losses(tmp_path / before) == want
        assert isinstance(made[-1], OffloadedOptimizer) is offload


def test_grpo_has_the_same_losses(tmp_path, checkpoint, made):
    data = grpo_runs.prompts(tmp_path / "prompts.jsonl")
    found = {}
    for offload in (False, True):
        out = tmp_path / str(offload)
        grpo_runs.run(**grpo_runs.tree(checkpoint, data, out, offload_optimizer=offload))
        found[offload] = losses(out), (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert found[True] == found[False]
    assert [isinstance(one, OffloadedOptimizer) for one in made] == [False, True]


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is optional")
@pytest.mark.slow
def test_8_bit_states_of_a_run_are_the_same_compiled_as_they_are(tmp_path, checkpoint):
    """Of a rank at which tensors are large enough for torchao to quantize their states."""
    data = write_jsonl(tmp_path / "few.jsonl", [chat(index) for index in range(4)])

    def run(out: Path, offload: bool) -> None:
        settings = {"steps": 4, "optimizer": "adamw_8bit", "offload_optimizer": offload, "save_every": 2}
        config = tree(checkpoint, data, out, **settings)
        config["lora"] |= {"dtype": "bfloat16", "r": 64}
        train(**config)

    run(tmp_path / "resident", False)
    run(tmp_path / "on host", True)
    want = losses(tmp_path / "resident")
    assert losses(tmp_path / "on host") == want
    (tmp_path / "on host" / "checkpoint-4").rename(tmp_path / "lost")
    run(tmp_path / "on host", False)
    assert losses(tmp_path / "on host") == want
