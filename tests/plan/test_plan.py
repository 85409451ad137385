"""A plan's terms against real tensors: weights, adapters, optimizer states, what a layer keeps; and the full sizes."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from transformers.optimization import Adafactor
from typer.testing import CliRunner

import octavo
import octavo.demo
from benchmarks.checkpoints import quantization_config, resolve
from octavo.cli.main import app
from octavo.errors import ConfigError, OctavoError
from octavo.nn.experts import Float8Experts
from octavo.nn.linear import Float8Linear
from octavo.ops.pieces import IN_FLIGHT, PIECE_BYTES
from octavo.plan.rehearsal import layer_costs, layers_of
from octavo.plan.skeleton import Adapters, bare_model, with_adapters
from octavo.plan.terms import MOST_REPLAYED, Planner, Request, _weights, state_tensors
from octavo.train.offloaded_optimizer import offloaded

GB = 1e9
SMALL = ["glm-tiny", "qwen-tiny"]
FULL = {"glm": (32.55, 410e6, 47.25), "qwen3-coder": (31.2, 629e6, 46.35)}
NARROW = Adapters(16, 16, targets=("attention", "experts"), dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=list(FULL))
def planner(request, tmp_path_factory) -> Planner:
    """Of a full-size model, from its config alone."""
    kind = resolve(request.param)
    folder = tmp_path_factory.mktemp("configs") / request.param
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**kind.sizes, "quantization_config": quantization_config(kind)}))
    return Planner(folder)


def real_bytes(model) -> tuple[int, int, int]:
    """Of codes, scales and the rest, by dtype rather than by module."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    size = {
        dtype: sum(t.numel() * t.element_size() for t in tensors if t.dtype == dtype)
        for dtype in {t.dtype for t in tensors}
    }
    codes, scales = size.pop(torch.uint8), size.pop(torch.int32)
    return codes, scales, sum(size.values())


@pytest.mark.parametrize("name", [*SMALL, "dense-tiny"])
@pytest.mark.parametrize("headers", [True, False], ids=["headers", "config alone"])
def test_weights_are_those_of_the_loaded_model(name, headers, tmp_path):
    folder = octavo.demo.checkpoint(name)
    if not headers:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    planned = _weights(bare_model(folder if headers else tmp_path))
    assert planned == real_bytes(octavo.load_model(folder))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd", "adamw_8bit"])
def test_adapters_and_optimizer_states_are_those_of_a_step(name, optimizer):
    folder = octavo.demo.checkpoint(name)
    model = octavo.load_model(folder)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=8))
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    if optimizer == "adamw":
        made = torch.optim.AdamW(parameters)
    elif optimizer == "adafactor":
        made = Adafactor(parameters, scale_parameter=False, relative_step=False, lr=1e-3)
    elif optimizer == "sgd":
        made = torch.optim.SGD(parameters, lr=1e-3)
    else:
        if find_spec("torchao") is None:
            pytest.skip("torchao is optional")
        from torchao.optim import AdamW8bit

        made = AdamW8bit(parameters)
        for parameter in parameters:
            made.state[parameter] = {k: made._new_buffer(parameter, k == "m") for k in ("m", "v")}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    if optimizer != "adamw_8bit":
        made.step()

    def size(tensor) -> int:
        inner = getattr(tensor, "tensor_attrs", None)
        return sum(size(getattr(tensor, n)) for n in inner) if inner else tensor.numel() * tensor.element_size()

    # The count of steps and adafactor's own norm of a tensor are numbers.
    real = sum(size(t) for held in made.state.values() for k, t in held.items() if torch.is_tensor(t) and t.numel() > 1)
    planned = Planner(folder).plan(Request(folder, Adapters(8, None), optimizer=optimizer))
    assert planned.adapters == sum(p.numel() * p.element_size() for p in parameters)
    assert sum(sum(state_tensors(optimizer, tuple(p.shape), 4)) for p in parameters) == planned.optimizer
    assert planned.optimizer == pytest.approx(real, rel=2e-3)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    ("dtype", "activations"),
    [(torch.bfloat16, "bf16"), (torch.float32, "bf16"), (torch.float32, "fp8")],
    ids=["bfloat16", "float32", "float32, activations in fp8"],
)
def test_what_layers_keep_is_what_autograd_keeps(name, dtype, activations):
    """Measured on the real model: every storage that is saved for backward and is none of the parameters'."""
    folder, seq = octavo.demo.checkpoint(name), 96
    model = octavo.load_model(folder, activations=activations)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=8), autocast_adapter_dtype=False)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    tuned.train()
    own = {t.untyped_storage().data_ptr() for t in [*tuned.parameters(), *tuned.buffers()]}
    saved: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # Held, so that no address is used twice.
            saved[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    x_BSH = torch.randn(1, seq, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        model.model(inputs_embeds=x_BSH, use_cache=False)
    real = sum(size for size, _ in saved.values())
    bare = bare_model(folder)
    costs = layer_costs(with_adapters(bare, Adapters(8, None, dtype=dtype)), bare, 1, seq, activations)
    assert len(costs) == len(layers_of(model)) == model.config.num_hidden_layers
    assert sum(cost.kept for cost in costs) == pytest.approx(real, rel=0.12)


def test_full_sizes_are_those_computed_for_the_real_models(planner):
    loaded, factors, long = FULL[Path(planner.checkpoint).name]
    adapters = Adapters(16, 16, targets=("experts",), dtype=torch.bfloat16)
    plan = planner.plan(Request(planner.checkpoint, adapters, optimizer="adamw_8bit"))
    assert plan.loaded / GB == pytest.approx(loaded, abs=0.03)
    assert plan.adapters / 2 == pytest.approx(factors, rel=0.01)
    # Adapters, their gradients and two states of a byte each.
    assert (2 * plan.adapters + plan.optimizer) == pytest.approx(6.03 * factors, rel=0.01)
    wide = planner.plan(Request(planner.checkpoint, Adapters(16, 16, targets=("experts",))))
    assert wide.adapters + wide.optimizer == pytest.approx(12 * factors, rel=0.01)
    at_32k = planner.plan(Request(planner.checkpoint, NARROW, seq=32_768, optimizer="adamw_8bit"))
    assert at_32k.peak / GB == pytest.approx(long, rel=0.03)
    assert at_32k.kept / GB == pytest.approx(6.3, rel=0.03)


def test_each_setting_moves_its_own_term(planner):
    base = Request(planner.checkpoint, NARROW, seq=8192, optimizer="adamw_8bit")
    plan = planner.plan(base)
    offloaded = planner.plan(replace(base, offload_hidden_states=True))
    assert offloaded.kept < plan.kept / 5
    everything = planner.plan(replace(base, checkpointing=False))
    assert everything.kept > 20 * plan.kept
    accumulated = planner.plan(replace(base, grad_accumulation=4))
    assert accumulated.peak > plan.peak
    assert accumulated.gradients == accumulated.adapters
    assert planner.plan(replace(base, seq=16_384)).peak > plan.peak
    assert plan.codes == offloaded.codes == everything.codes


def test_experts_on_the_host_leave_a_ring(planner):
    """Two layers' codes and scales in place of all, and every other term as it was."""
    base = Request(planner.checkpoint, NARROW, seq=8192, optimizer="adamw_8bit")
    plan, streamed = planner.plan(base), planner.plan(replace(base, experts="host"))
    experts = [m for m in bare_model(planner.checkpoint).modules() if isinstance(m, Float8Experts)]
    layers = [sum(m.get_parameter(name).nbytes for name in m.streamed_names) for m in experts]
    assert streamed.host == sum(layers)
    assert streamed.ring == 2 * layers[0]
    assert plan.loaded - streamed.loaded == streamed.host
    assert plan.peak - streamed.peak == streamed.host - streamed.ring
    assert (plan.ring, plan.host) == (0, 0)
    assert streamed.peak < 16e9 < plan.peak
    assert any(change.says == "model.experts: host" and change.same_run for change in planner.changes(base))


def test_recorded_layers_hold_one_layers_memory_all_the_time(planner):
    """While the loss is computed too, which may lend that of layers that are not recorded."""
    base = Request(planner.checkpoint, NARROW, seq=4096)
    plan, recorded = planner.plan(base), planner.plan(replace(base, graphs=True))
    assert plan.recordings == 0
    assert recorded.recordings > max(plan.transient, 0)
    rest = recorded.peak - recorded.recordings
    assert plan.peak - plan.transient < rest
    assert recorded.peak < plan.peak + plan.transient + recorded.loss + recorded.gradients
    change = next(
        change for change in planner.changes(replace(base, graphs=True)) if change.says.startswith("train.gr")
    )
    assert (change.says, change.saves) == ("train.graphs: false", recorded.peak - plan.peak)
    # without checkpointing nothing is recorded
    kept = replace(base, checkpointing=False)
    assert planner.plan(replace(kept, graphs=True)) == planner.plan(kept)
    # nor with experts on the host, nor by itself where rows are long: a change is what it leads to
    host = replace(base, experts="host")
    assert planner.plan(replace(host, graphs=True)) == planner.plan(host)
    long = replace(base, seq=2 * MOST_REPLAYED, graphs="auto")
    assert planner.plan(long).recordings == 0
    assert planner.plan(replace(base, graphs="auto")) == recorded
    shorter = next(change for change in planner.changes(long) if change.says == f"data.max_length: {MOST_REPLAYED}")
    after = planner.plan(replace(long, seq=MOST_REPLAYED))
    assert after.recordings > 0
    assert shorter.saves == planner.plan(long).peak - after.peak


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor"])
def test_optimizer_states_on_the_host_pass_through_in_the_step(planner, optimizer):
    """Every other term is as it was, and in the step itself no more is there than pieces in flight."""
    adapters = Adapters(16, 16, targets=("attention", "experts"))
    base = Request(planner.checkpoint, adapters, seq=8192, optimizer=optimizer)
    plan, streamed = planner.plan(base), planner.plan(replace(base, offload_optimizer=True))
    assert streamed.host_optimizer == plan.optimizer > 0
    assert (streamed.host, plan.host_optimizer, streamed.optimizer) == (0, 0, 0)
    assert streamed.moment == plan.moment != "the optimizer's step"
    assert plan.peak - streamed.peak == plan.optimizer
    change = next(change for change in planner.changes(base) if change.says == "train.offload_optimizer: true")
    assert change.same_run
    assert change.saves == plan.optimizer
    again = planner.changes(change.request)
    assert not any("offload_optimizer" in change.says for change in again)


@pytest.mark.parametrize("name", SMALL)
def test_in_the_step_pieces_of_the_optimizer_states_are_there(name):
    """Of a row so short that no layer's backward pass takes more."""
    planner = Planner(octavo.demo.checkpoint(name))
    request = Request(planner.checkpoint, Adapters(64, 64), seq=8, offload_optimizer=True)
    few = planner.plan(request)
    assert few.moment == "the optimizer's step"
    assert few.optimizer == few.host_optimizer < IN_FLIGHT * PIECE_BYTES
    many = planner.plan(replace(request, adapters=Adapters(256, 256)))
    assert many.optimizer == IN_FLIGHT * PIECE_BYTES < many.host_optimizer


@pytest.mark.parametrize("name", SMALL)
def test_what_the_host_holds_is_what_a_step_leaves_there(name):
    folder = octavo.demo.checkpoint(name)
    model = octavo.load_model(folder)
    tuned = peft.get_peft_model(model, octavo.lora_config(model, r=8))
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    made = offloaded(torch.optim.AdamW(parameters), "adamw")
    made.step()
    plan = Planner(folder).plan(Request(folder, Adapters(8, None), offload_optimizer=True))
    assert made.host_bytes == plan.host_optimizer


def test_an_optimizer_without_states_has_none_to_offload(planner):
    request = Request(planner.checkpoint, NARROW, optimizer="sgd")
    assert not any("offload_optimizer" in change.says for change in planner.changes(request))


@pytest.mark.parametrize("name", SMALL)
def test_what_a_ring_takes_is_what_it_allocates(name):
    folder = octavo.demo.checkpoint(name)
    model = octavo.load_model(folder, experts="host")
    model(input_ids=torch.arange(8)[None])
    planned = Planner(folder).plan(Request(folder, Adapters(4, None), experts="host"))
    (ring,) = {m.ring for m in model.modules() if isinstance(m, Float8Experts)}
    # Tensors in a buffer begin at multiples of 512 bytes.
    assert planned.ring <= sum(buffer.nbytes for buffer in ring.buffers) < planned.ring + 2 * 4 * 512


def test_the_balancing_loss_of_a_long_row_is_seen(tmp_path):
    kind = resolve("qwen3-coder").resized(router_aux_loss_coef=0.001)
    (tmp_path / "config.json").write_text(json.dumps({**kind.sizes, "quantization_config": quantization_config(kind)}))
    planner = Planner(tmp_path)
    request = Request(tmp_path, NARROW, seq=32_768, optimizer="adamw_8bit")
    plan = planner.plan(request)
    # One-hot int64 alone: layers x tokens x experts per token x experts x 8 bytes.
    assert plan.moment == "the loss"
    assert plan.loss > 48 * 32_768 * 8 * 128 * 8
    assert any("router_aux_loss" in change.says for change in planner.changes(request))


@pytest.mark.parametrize("name", SMALL)
def test_changes_come_the_most_helpful_first_and_keep_their_word(name):
    planner = Planner(octavo.demo.checkpoint(name))
    request = Request(planner.checkpoint, Adapters(16, 16), batch=2, seq=4096)
    before = planner.plan(request).peak
    changes = planner.changes(request)
    assert [c.same_run for c in changes] == sorted((c.same_run for c in changes), reverse=True)
    for same_run in (True, False):
        saved = [change.saves for change in changes if change.same_run is same_run]
        assert saved == sorted(saved, reverse=True)
    for change in changes:
        assert planner.plan(change.request).peak == before - change.saves


def test_the_command_says_what_fits_and_what_would(tmp_path):
    kind = resolve("glm")
    (tmp_path / "config.json").write_text(json.dumps({**kind.sizes, "quantization_config": quantization_config(kind)}))
    arguments = ["plan", str(tmp_path), "--gpu", "40GB", "--seq", "4096", "--expert-rank", "16"]
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["fits"] is False
    assert found["peak_gb"] == pytest.approx(sum(found["terms_gb"].values()))
    assert found["changes"][0]["same_run"]
    narrow = ["--optimizer", "adamw_8bit", "--adapter-dtype", "bfloat16"]
    found = json.loads(CliRunner().invoke(app, [*arguments, *narrow, "--json"]).stdout)
    assert found["fits"] is True
    small = CliRunner().invoke(app, [*arguments, *narrow, "--experts", "host", "--gpu", "24GB"]).stdout
    for said in ("fits in 24 GB", "pinned host memory", "buffers for layers"):
        assert said in small
    wide = json.loads(CliRunner().invoke(app, [*arguments, "--offload-optimizer", "--json"]).stdout)
    assert wide["host_gb"] == wide["host_terms_gb"]["optimizer"] > 3
    assert wide["terms_gb"]["optimizer"] < 0.2
    both = CliRunner().invoke(app, [*arguments, "--offload-optimizer", "--experts", "host"], env={"COLUMNS": "120"})
    assert "GB of experts and 3.52 GB of optimizer states are in pinned host memory" in both.stdout
    refused = CliRunner().invoke(app, [*arguments, "--offload-optimizer", "--optimizer", "sgd"])
    assert refused.exit_code == 1
    text = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"}).stdout
    assert "buffers for layers" not in text
    assert "does not fit in 40 GB" in text
    assert "train.optimizer: adamw_8bit and lora.dtype: bfloat16" in text
    assert "lora.targets: [attention, mlp, shared_experts]" in text


@pytest.mark.parametrize(("text", "expected"), [("40GB", 40e9), ("24", 24e9), ("80 GiB", 80 * 2**30), ("1.5gb", 1.5e9)])
def test_amounts_of_memory(text, expected):
    from octavo.cli.plan import gpu_bytes

    assert gpu_bytes(text) == expected


def test_what_cannot_be_planned_is_said(tmp_path):
    from octavo.cli.plan import gpu_bytes

    for wrong in ("many", "0GB", "-4GB"):
        with pytest.raises(ConfigError, match="no amount of memory"):
            gpu_bytes(wrong)
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert "config.json" in json.loads(result.stdout)["error"]
    config = json.loads((octavo.demo.checkpoint("glm-tiny") / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert CliRunner().invoke(app, ["plan", str(tmp_path)]).exit_code == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonsense"}, "transformers cannot read the config.json of"),
        ({"hidden_size": 8}, "transformers cannot read the config.json of"),
        ({"model_type": "t5"}, "is a t5 model, which AutoModelForCausalLM of transformers does not build"),
    ],
)
def test_a_config_of_no_language_model_is_said_in_one_sentence(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["plan", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert message in json.loads(result.stdout)["error"]


def test_a_target_that_is_named_twice_is_one():
    arguments = ["plan", str(octavo.demo.checkpoint("glm-tiny")), "--json", "--target", "experts"]
    once, twice = (CliRunner().invoke(app, [*arguments, *more]) for more in ([], ["--target", "experts"]))
    assert once.exit_code == 0
    assert once.stdout == twice.stdout


def test_a_bfloat16_model_has_no_codes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(resolve("glm", tiny=True).sizes)))
    planner = Planner(tmp_path)
    plan = planner.plan(Request(tmp_path, Adapters(4, None)))
    assert (plan.codes, plan.scales) == (0, 0)
    with pytest.raises(OctavoError, match="no routed experts in FP8"):
        planner.plan(Request(tmp_path, Adapters(4, None), experts="host"))
    model = bare_model(tmp_path)
    assert not [m for m in model.modules() if isinstance(m, Float8Experts | Float8Linear)]
    assert plan.plain >= sum(p.numel() * 2 for p in model.parameters())
