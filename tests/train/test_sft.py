"""``octavo sft`` from a configuration to an adapter, on a tiny model."""

import json
import os
import resource
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

import octavo
from octavo.errors import ConfigError
from octavo.train.config import load_config
from octavo.train.metrics import read_metrics
from octavo.train.trainer import TrainingError
from octavo.train.watched import SavingError

from .tiny import Screen, byte_tokenizer, chat, tiny_config, train, tree, write_jsonl


def losses(out) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_a_run_leaves_everything_needed_to_repeat_and_to_use_it(tmp_path, checkpoint, chats):
    screen = Screen()
    result = train(screen, **tree(checkpoint, chats, tmp_path / "run"))
    out = tmp_path / "run"
    assert (result.step, result.adapter, result.signal) == (3, out / "adapter", None)
    assert load_config(out / "config.yaml").resolved() == load_config(out / "config.yaml")
    versions = json.loads((out / "versions.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__.split("+")[0] or versions["packages"]["torch"]
    assert versions["device"].startswith(("cpu", "cuda"))
    assert versions["processes"] == 1
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert {"loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gb", "expert_load"} <= record.keys()
        assert record["expert_load"] >= 1
    assert records[-1]["loss"] == result.loss
    assert (out / "checkpoint-3" / "optimizer.pt").is_file()
    assert not (out / "adapter" / "training_args.bin").exists()
    # The adapter works on its own: model and tokenizer as a user would load them.
    tokenizer = AutoTokenizer.from_pretrained(out / "adapter")
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    model = PeftModel.from_pretrained(octavo.load_model(checkpoint, dtype=torch.float32), out / "adapter")
    factors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(torch.count_nonzero(value) for name, value in factors.items() if "lora_B" in name)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def test_before_the_first_step_a_person_sees_what_will_happen(tmp_path, checkpoint, chats):
    screen = Screen()
    result = train(screen, dry_run=True, **tree(checkpoint, chats, tmp_path / "run"))
    text = screen.getvalue()
    assert (result.step, result.adapter) == (0, None)
    assert "Qwen3" in text or "self_attn" in text
    for group in ("attention", "routed experts", "total"):
        assert group in text
    assert "24 examples" in text
    # The first chat of the shuffled order or not: the data set's first row, its answer marked.
    assert "<|user|>say 0<|end|><|assistant|>⟦ab0<|end|>⟧" in text
    assert "4 of its 12 tokens count (loss on assistant)" in text
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_lines_when_not_a_terminal_and_a_bar_when_it_is_one(tmp_path, checkpoint, chats):
    plain, live = Screen(), Screen()
    train(plain, **tree(checkpoint, chats, tmp_path / "plain"))
    train(live, terminal=True, **tree(checkpoint, chats, tmp_path / "live"))
    lines = [line for line in plain.getvalue().splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for figure in ("loss", "lr", "grad", "tok/s", "peak", "expert load max/mean"):
        assert figure in lines[0]
    assert "\x1b[" not in plain.getvalue()
    assert "3/3" in live.getvalue()
    assert "\x1b[" in live.getvalue()
    assert "tensors proven" in plain.getvalue()
    assert losses(tmp_path / "plain") == losses(tmp_path / "live"), "how it is shown changes nothing"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_to_bit_equal_losses(tmp_path, checkpoint, chats, number):
    # 24 examples in batches of 5, in shuffled order: the resumed run crosses into a second epoch.
    settings = {"steps": 8, "batch_size": 5, "logging_steps": 1, "seed": 3}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(**tree(checkpoint, chats, straight, **settings))
    before = signal.getsignal(number)
    first = train(Screen(after="step 2/8", number=number), **tree(checkpoint, chats, resumed, **settings))
    assert (first.signal, first.step, first.adapter) == (int(number), 3, None)
    assert signal.getsignal(number) is before, "handlers are given back"
    screen = Screen()
    second = train(screen, **tree(checkpoint, chats, resumed, **settings))
    assert second.resumed_from == resumed / "checkpoint-3"
    assert "resuming from" in screen.getvalue()
    assert second.step == 8
    for key in ("loss", "grad_norm", "lr", "epoch"):
        a, b = ([line[key] for line in read_metrics(out / "metrics.jsonl")] for out in (straight, resumed))
        assert a == b, key
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (straight, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_crashed_run_repeats_its_lost_steps_once_in_the_metrics(tmp_path, checkpoint, chats):
    out = tmp_path / "run"
    settings = {"steps": 6, "save_every": 2}
    train(**tree(checkpoint, chats, out, **settings))
    whole = losses(out)
    # As if the process had died after step 5: the last checkpoint is that of step 4.
    (out / "checkpoint-6").rename(tmp_path / "lost")
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:5]) + '{"step": 6, "lo')
    result = train(**tree(checkpoint, chats, out, **settings))
    assert result.resumed_from == out / "checkpoint-4"
    assert losses(out) == whole


@pytest.mark.parametrize("state", [None, b'{"epoch": 1.0, "glo'], ids=["missing", "cut"])
def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path, checkpoint, chats, state):
    out, settings = tmp_path / "run", {"steps": 4, "save_every": 2}
    train(**tree(checkpoint, chats, out, **settings))
    whole = losses(out)
    (out / "checkpoint-4" / "trainer_state.json").unlink()
    if state is not None:
        (out / "checkpoint-4" / "trainer_state.json").write_bytes(state)
    screen = Screen()
    result = train(screen, **tree(checkpoint, chats, out, **settings))
    assert (result.resumed_from, result.step) == (out / "checkpoint-2", 4)
    assert "not written to its end: checkpoint-4" in screen.getvalue()
    assert losses(out) == whole
    assert train(**tree(checkpoint, chats, out, **settings)).resumed_from == out / "checkpoint-4", "written again"
    with pytest.raises(ConfigError, match="no whole trainer_state"):
        train(**tree(checkpoint, chats, tmp_path / "other", resume=str(tmp_path)))


@pytest.mark.parametrize("damage", ["old", "cut", "gone"])
def test_a_run_that_was_killed_before_it_wrote_its_adapter_writes_it(tmp_path, checkpoint, chats, damage):
    out = tmp_path / "run"
    train(**tree(checkpoint, chats, out, steps=2, scheduler="constant"))
    file = out / "adapter" / "adapter_model.safetensors"
    old = file.read_bytes()
    train(**tree(checkpoint, chats, out, steps=4, scheduler="constant"))
    trained = file.read_bytes()
    assert trained != old
    if damage == "gone":
        shutil.rmtree(out / "adapter")
    else:
        file.write_bytes(old if damage == "old" else trained[:100])
    again = train(**tree(checkpoint, chats, out, steps=4, scheduler="constant"))
    assert (again.step, again.adapter) == (4, out / "adapter")
    assert file.read_bytes() == trained
    assert not (out / "adapter" / "optimizer.pt").exists()


def test_a_disk_that_is_full_is_told_in_one_sentence_and_costs_the_last_steps_only(tmp_path, checkpoint, chats):
    out = tmp_path / "run"
    changed = tree(checkpoint, chats, out, steps=4, save_every=2) | {"lora": {"r": 64}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for what a run writes in text, and not for an adapter of 340 KB.
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(SavingError, match=r"The checkpoint of step 2 cannot be written to .*run: .*Make room"):
            train(**changed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    screen = Screen()
    assert train(screen, **changed).step == 4
    assert "not written to its end: checkpoint-2" in screen.getvalue()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_an_out_that_cannot_be_a_folder_is_refused_before_anything_loads(tmp_path, chats, out):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"`out`: .*file is a file"):
        train(**tree(tmp_path / "no model", chats, tmp_path / out))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash attention is there")
def test_an_attention_that_is_not_installed_is_said_in_one_sentence(tmp_path, checkpoint, chats):
    changed = tree(checkpoint, chats, tmp_path / "run")
    changed["model"] |= {"attention": "flash_attention_2"}
    with pytest.raises(ConfigError, match=r"`model\.attention: flash_attention_2` cannot be had here: .*`auto`"):
        train(**changed)


def test_a_dry_run_leaves_the_record_of_a_run_as_it_is(tmp_path, checkpoint, chats):
    out = tmp_path / "run"
    train(**tree(checkpoint, chats, out))
    before = (out / "config.yaml").read_text()
    train(dry_run=True, **tree(checkpoint, chats, out, lr=5e-3, steps=9))
    assert (out / "config.yaml").read_text() == before
    train(**tree(checkpoint, chats, out, lr=5e-3, steps=4))
    assert (out / "config.yaml").read_text() != before


def test_how_a_run_resumes_is_the_users_choice(tmp_path, checkpoint, chats):
    out = tmp_path / "run"
    train(**tree(checkpoint, chats, out, steps=2, save_every=1))
    with pytest.raises(ConfigError, match=r"holds checkpoints of an earlier run, last checkpoint-2"):
        train(**tree(checkpoint, chats, out, resume="never"))
    with pytest.raises(ConfigError, match="is no checkpoint of a run"):
        train(**tree(checkpoint, chats, out, resume=str(tmp_path)))
    screen = Screen()
    changed = tree(checkpoint, chats, tmp_path / "other", steps=2, resume=str(out / "checkpoint-1"))
    assert train(screen, **changed).resumed_from == out / "checkpoint-1"
    assert losses(tmp_path / "other") == losses(out)[1:]
    screen = Screen()
    train(screen, **tree(checkpoint, chats, out, steps=3, save_every=1, lr=2e-2))
    assert "`train.lr` differs" in screen.getvalue()


@pytest.mark.parametrize("section", [{"lora": {"r": 8}}, {"model": {"revision": "other", "dtype": "float32"}}])
def test_a_run_goes_on_with_its_own_model_and_adapter_only(tmp_path, checkpoint, chats, section):
    out = tmp_path / "run"
    train(**tree(checkpoint, chats, out, steps=2, save_every=1))
    started = (out / "config.yaml").read_text()
    again = tree(checkpoint, chats, out, steps=3)
    changed = {name: again[name] | fields for name, fields in section.items()}
    with pytest.raises(ConfigError, match=r"holds a run with another (lora\.r|model\.revision).*Choose another `out`"):
        train(**(again | changed))
    assert (out / "config.yaml").read_text() == started, "a refused attempt changes nothing"


def test_a_finished_run_is_left_as_it_is(tmp_path, checkpoint, chats):
    """transformers itself would take one more step."""
    out, screen = tmp_path / "run", Screen()
    first = train(**tree(checkpoint, chats, out))
    again = train(screen, **tree(checkpoint, chats, out))
    assert "nothing to do" in screen.getvalue()
    assert (again.step, again.max_steps, again.adapter, again.loss) == (3, 3, out / "adapter", first.loss)
    assert len(losses(out)) == 3
    assert train(**tree(checkpoint, chats, out, steps=4)).step == 4
    assert len(losses(out)) == 4


def test_a_signal_in_the_last_step_interrupts_nothing(tmp_path, checkpoint, chats):
    result = train(Screen(after="step 2/3"), **tree(checkpoint, chats, tmp_path / "run"))
    assert (result.signal, result.step) == (None, 3)
    assert result.adapter is not None


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_gradient_checkpointing_changes_no_loss(tmp_path, checkpoint, chats, kind):
    train(**tree(checkpoint, chats, tmp_path / "without", gradient_checkpointing="none"))
    train(**tree(checkpoint, chats, tmp_path / "with", gradient_checkpointing=kind))
    # The recomputed activations are the same; a reentrant backward adds some gradients in another order.
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), rel=1e-5)


def test_bf16_autocast_trains_close_to_float32(tmp_path, checkpoint, chats):
    train(**tree(checkpoint, chats, tmp_path / "exact", steps=6))
    lowered = tree(checkpoint, chats, tmp_path / "lowered", steps=6, precision="bf16")
    lowered["model"]["dtype"] = "bfloat16"
    train(**lowered)
    assert losses(tmp_path / "lowered") != losses(tmp_path / "exact")
    # 8 bits of mantissa: 0.4 % on a weight, less on a loss that averages over 40 tokens.
    assert losses(tmp_path / "lowered") == pytest.approx(losses(tmp_path / "exact"), rel=5e-3)


def test_gradient_accumulation_is_a_larger_batch(tmp_path, checkpoint, chats):
    # Without the balancing loss, which is a mean per forward: then only the order of sums differs.
    for name, size, accumulation in (("one", 4, 1), ("two", 2, 2)):
        settings = {"batch_size": size, "grad_accumulation": accumulation, "router_aux_loss": 0.0}
        train(**tree(checkpoint, chats, tmp_path / name, **settings))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_evaluation_and_early_stopping_keep_the_best_adapter(tmp_path, checkpoint, chats):
    out = tmp_path / "run"
    # A rate that ruins the model after a good start.
    settings = {"steps": 40, "lr": 0.3, "eval_every": 1, "save_every": 1, "early_stopping": 2, "eval_on_start": True}
    config = tree(checkpoint, chats, out, **settings)
    config["data"]["eval_fraction"] = 0.25
    result = train(**config)
    records = read_metrics(out / "metrics.jsonl")
    evaluations = {line["step"]: line["eval_loss"] for line in records if "eval_loss" in line}
    assert 0 in evaluations, "evaluated before the first step"
    assert result.step < 40
    steps = sorted(evaluations)
    best = min((step for step in steps if step > 0), key=evaluations.__getitem__)
    assert result.step == best + 2, "stopped after two evaluations without a better loss"
    kept, at_best = (
        load_file(path / "adapter_model.safetensors") for path in (out / "adapter", out / f"checkpoint-{best}")
    )
    assert all(torch.equal(kept[name], at_best[name]) for name in kept)


def test_a_loss_that_is_not_a_number_stops_the_run_before_the_optimizer(tmp_path, chats):
    """One example holds a token whose embedding is infinite; until its turn, all is well."""
    folder, out = tmp_path / "model", tmp_path / "run"
    model = Qwen3MoeForCausalLM(tiny_config())
    [bad] = byte_tokenizer()("Z")["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = torch.inf
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    rows = [chat(index) for index in range(24)]
    rows[17]["messages"][0]["content"] = "Z"
    config = tree(
        folder, write_jsonl(tmp_path / "a.jsonl", rows), out, steps=24, batch_size=1, save_every=1, scheduler="constant"
    )
    with pytest.raises(TrainingError, match=r"The loss of step (\d+) is nan") as error:
        train(**config)
    failed = int(str(error.value).split("step ")[1].split()[0])
    assert failed > 1
    assert len(losses(out)) == failed - 1
    last = out / f"checkpoint-{failed - 1}"
    assert all(value.isfinite().all() for value in load_file(last / "adapter_model.safetensors").values())
    assert not (out / f"checkpoint-{failed}").exists()
    # Asked to go on, it does, and the record says null: JSON has no NaN.
    config["train"] |= {"stop_on_nan": False, "steps": failed}
    config["out"] = str(tmp_path / "regardless")
    train(**config)
    assert losses(tmp_path / "regardless") == [*losses(out), None]


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        ({"prompt": "2+2=", "completion": "4"}, "2+2=⟦4<|end|>⟧"),
        (
            {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]},
            "<|user|>hi<|end|><|assistant|>⟦ho<|end|>⟧",
        ),
        ({"text": "once"}, "o⟦nce<|end|>⟧"),
    ],
    ids=["pair", "pair-of-turns", "text"],
)
def test_other_formats_train_on_what_they_say(tmp_path, checkpoint, row, counted):
    screen = Screen()
    data = write_jsonl(tmp_path / "a.jsonl", [row] * 8)
    assert train(screen, **tree(checkpoint, data, tmp_path / "run", steps=2)).step == 2
    assert counted in screen.getvalue()


def test_a_parquet_file_trains_like_the_jsonl(tmp_path, checkpoint, chats):
    from datasets import Dataset

    Dataset.from_list([chat(index) for index in range(24)]).to_parquet(tmp_path / "chats.parquet")
    train(**tree(checkpoint, chats, tmp_path / "a", steps=2))
    train(**tree(checkpoint, tmp_path / "chats.parquet", tmp_path / "b", steps=2))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_packing_changes_rows_and_not_what_is_learned(tmp_path, checkpoint, chats):
    """Documents in one row must not see each other: the loss of a whole epoch in one step is the unpacked one."""
    settings = {"steps": 1, "batch_size": 24, "lr": 1e-9, "router_aux_loss": 0.0}
    train(**tree(checkpoint, chats, tmp_path / "plain", **settings))
    packed = tree(checkpoint, chats, tmp_path / "packed", **settings)
    packed["data"]["packing"] = True
    screen = Screen()
    train(screen, **packed)
    assert "packed rows" in screen.getvalue()
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_cut_and_dropped_examples_are_counted(tmp_path, checkpoint):
    long = {"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]}
    cut = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 100}]}
    data = write_jsonl(tmp_path / "a.jsonl", [long, cut, chat(0), chat(1)])
    screen = Screen()
    train(screen, dry_run=True, **tree(checkpoint, data, tmp_path / "run"))
    assert "3 examples" in screen.getvalue()
    assert "2 cut at max_length, 1 of them dropped" in screen.getvalue()


def test_data_without_a_token_that_counts_is_refused(tmp_path, checkpoint):
    long = {"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}]}
    data = write_jsonl(tmp_path / "a.jsonl", [long] * 4)
    with pytest.raises(ConfigError, match=r"All 4 examples of .* cut at `data\.max_length: 64`"):
        train(**tree(checkpoint, data, tmp_path / "run"))


def test_a_template_that_marks_no_turns_is_refused_until_one_is_given(tmp_path, chats):
    folder = tmp_path / "model"
    Qwen3MoeForCausalLM(tiny_config()).save_pretrained(folder)
    bare = byte_tokenizer().chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    byte_tokenizer(bare).save_pretrained(folder)
    config = tree(folder, chats, tmp_path / "run", steps=1)
    with pytest.raises(ConfigError, match=r"does not mark assistant turns"):
        train(**config)
    (tmp_path / "marked.jinja").write_text(byte_tokenizer().chat_template)
    config["data"]["chat_template"] = str(tmp_path / "marked.jinja")
    screen = Screen()
    train(screen, **config)
    assert "⟦ab0<|end|>⟧" in screen.getvalue()
    config["data"] = {"train": str(chats), "loss": "all"}
    config["out"] = str(tmp_path / "all")
    screen = Screen()
    train(screen, **config)
    assert "⟦say 0<|end|><|assistant|>ab0<|end|>⟧" in screen.getvalue()
    byte_tokenizer(None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    config["out"] = str(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no chat template"):
        train(**config)


@pytest.mark.parametrize("reporter", ["tensorboard", "trackio"])
def test_metrics_go_to_a_reporter_too(tmp_path, checkpoint, chats, reporter):
    if find_spec(reporter) is None:
        with pytest.raises(ConfigError, match=f"Run: pip install {reporter}"):
            train(**tree(checkpoint, chats, tmp_path / "run", report_to=reporter))
        return
    train(**tree(checkpoint, chats, tmp_path / "run", report_to=reporter))
    if reporter == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        [folder] = {path.parent for path in (tmp_path / "run").rglob("events.out.*")}
        events = EventAccumulator(str(folder)).Reload()
        logged = [event.value for event in events.Scalars("train/loss")]
        assert logged == pytest.approx(losses(tmp_path / "run"), rel=1e-6)
        assert len(events.Scalars("train/expert_load")) == 3
    else:
        # a server beside the run writes them, when the machine lets it
        end = time.monotonic() + 60
        while not (written := list(Path(os.environ["TRACKIO_DIR"]).rglob("octavo*"))) and time.monotonic() < end:
            time.sleep(0.2)
        assert written


def test_a_folder_without_a_tokenizer_is_refused(tmp_path, chats):
    Qwen3MoeForCausalLM(tiny_config()).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="no tokenizer that loads"):
        train(**tree(tmp_path / "model", chats, tmp_path / "run"))


def test_the_written_config_is_yaml_with_every_key(tmp_path, checkpoint, chats):
    train(dry_run=True, **tree(checkpoint, chats, tmp_path / "run"))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["train"]["weight_decay"] == 0.0
    assert written["lora"]["r"] == 4
