"""``octavo grpo`` from a configuration to an adapter."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from typer.testing import CliRunner

import octavo
from octavo.cli.main import app
from octavo.errors import ConfigError, EngineError
from octavo.integrations import generation
from octavo.train.agreement import AgreementError
from octavo.train.config import check_config, read_config
from octavo.train.grpo_config import GrpoConfig
from octavo.train.metrics import read_metrics

from .grpo_runs import prompts, run, tree
from .tiny import Screen, byte_tokenizer, tiny_config, write_jsonl

ROOT = Path(__file__).parents[2]
WORDS = ("river", "chair", "walk", "paint", "stone", "hammer", "love", "fish", "call", "mark", "cook", "play")


@pytest.fixture
def questions(tmp_path):
    return prompts(tmp_path / "prompts.jsonl")


def metrics(out, key):
    return [line[key] for line in read_metrics(out / "metrics.jsonl")]


def test_a_run_leaves_curves_completions_and_an_adapter_that_works(tmp_path, checkpoint, questions):
    out, screen = tmp_path / "run", Screen()
    result = run(screen, **tree(checkpoint, questions, out, beta=0.05))
    assert (result.step, result.adapter, result.signal) == (3, out / "adapter", None)
    records = read_metrics(out / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert {
            "loss",
            "reward",
            "reward_std",
            "reward_vowels",
            "kl",
            "clip_ratio",
            "entropy",
            "completion_tokens",
            "agreement_mean",
            "agreement_worst",
            "rollout_tokens_per_second",
            "sync_bytes",
            "lr",
            "grad_norm",
            "peak_memory_gb",
        } <= record.keys()
        # Whose reward it is: the only function, with weight 1.
        assert record["reward"] == pytest.approx(record["reward_vowels"])
        # The model samples for itself, in the same arithmetic.
        assert 0 < record["agreement_worst"] < 1e-4
        assert record["agreement_mean"] <= record["agreement_worst"]
        assert record["sync_bytes"] == 0
    # B is zero: the model is its own reference, until it moves.
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert records[-1]["kl"] > 1e-4
    assert result.reward == records[-1]["reward"]
    assert read_config(GrpoConfig, out / "config.yaml").resolved() == read_config(GrpoConfig, out / "config.yaml")
    lines = read_metrics(out / "completions.jsonl")
    assert [line["step"] for line in lines] == [step for step in (1, 2, 3) for _ in range(8)]
    for step in (1, 2, 3):
        those = [line for line in lines if line["step"] == step]
        scored = [sum(c in "aeiou" for c in line["completion"]) / max(len(line["completion"]), 1) for line in those]
        assert [line["rewards"]["vowels"] for line in those] == pytest.approx(scored)
        assert sum(scored) / 8 == pytest.approx(records[step - 1]["reward"])
        # Advantages are relative to the other completions of the prompt.
        for group in (those[:4], those[4:]):
            assert len({line["prompt"] for line in group}) == 1
            assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-3)
    for said in ("2 prompts x 4 completions", "sampled by the model itself", "reward vowels", "tensors proven"):
        assert said in screen.getvalue()
    model = PeftModel.from_pretrained(octavo.load_model(checkpoint, dtype=torch.float32), out / "adapter")
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_the_reward_rises_on_a_real_model(tmp_path):
    """Dictionary entries: most are of nouns, those of verbs are rewarded."""
    words = write_jsonl(tmp_path / "words.jsonl", [{"prompt": f"{word},"} for word in WORDS])
    settings = {"steps": 8, "prompts": 4, "completions": 8, "batch_size": 32, "lr": 5e-3}
    changed = tree(octavo.demo.checkpoint("qwen-tiny"), words, tmp_path / "run", **settings)
    changed["rewards"] = [{"function": "format", "arguments": {"pattern": r"v\..*"}}]
    changed["rollout"] = {"max_new_tokens": 4}
    run(**changed)
    rewards = metrics(tmp_path / "run", "reward")
    assert sum(rewards[-3:]) / 3 > 2 * rewards[0] > 0


def test_sampling_on_fixed_buffers_takes_the_same_steps(tmp_path, checkpoint, questions, monkeypatch):
    """The loop that CUDA graphs need, on a CPU, against transformers' own: same samples, probabilities and rewards."""
    screen = Screen()
    run(screen, **tree(checkpoint, questions, tmp_path / "own"))
    assert "without CUDA graphs: it lies on cpu" in screen.getvalue()
    monkeypatch.setattr(generation, "why_no_graphs", generation.why_not_static)
    screen = Screen()
    run(screen, **tree(checkpoint, questions, tmp_path / "fixed"))
    assert "each token as a CUDA graph" in screen.getvalue()
    assert metrics(tmp_path / "fixed", "reward") == metrics(tmp_path / "own", "reward")
    assert metrics(tmp_path / "fixed", "completion_tokens") == metrics(tmp_path / "own", "completion_tokens")
    assert max(metrics(tmp_path / "fixed", "agreement_worst")) < 1e-4


def test_graphs_that_were_asked_for_and_cannot_be_stop_the_run(tmp_path, checkpoint, questions):
    changed = tree(checkpoint, questions, tmp_path / "run")
    changed["rollout"] |= {"graphs": True}
    with pytest.raises(EngineError, match="asked for, but it lies on cpu"):
        run(**changed)


def test_forwards_of_any_size_take_the_same_step(tmp_path, checkpoint, questions):
    for size in (8, 2):
        run(**tree(checkpoint, questions, tmp_path / str(size), batch_size=size))
    # The order of sums differs, and nothing else: completions are sampled all at once in both.
    assert metrics(tmp_path / "8", "reward") == metrics(tmp_path / "2", "reward")
    assert metrics(tmp_path / "8", "grad_norm") == pytest.approx(metrics(tmp_path / "2", "grad_norm"), rel=1e-3)


def test_an_interrupted_run_resumes_to_bit_equal_rewards(tmp_path, checkpoint, questions):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    settings = {"steps": 5, "seed": 3}
    run(**tree(checkpoint, questions, straight, **settings))
    first = run(Screen(after="step 2/5"), **tree(checkpoint, questions, resumed, **settings))
    assert (first.step, first.adapter) == (3, None)
    # As if the process had died later on, in the middle of a line.
    with (resumed / "completions.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "say 1", "comp')
    second = run(**tree(checkpoint, questions, resumed, **settings))
    assert second.resumed_from == resumed / "checkpoint-3"
    for key in ("reward", "loss", "grad_norm", "completion_tokens"):
        assert metrics(straight, key) == metrics(resumed, key), key
    assert (straight / "completions.jsonl").read_text() == (resumed / "completions.jsonl").read_text()
    one, other = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_completion_with_its_own_ends_of_lines_does_not_stop_a_resume(tmp_path, checkpoint, questions):
    out = tmp_path / "run"
    run(**tree(checkpoint, questions, out, steps=1))
    path = out / "completions.jsonl"
    first, *rest = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    lines = [first | {"completion": "a\u2028b\x85c"}, *rest]
    whole = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    # And as a crash would leave it, in the middle of a character.
    path.write_bytes(whole + '{"step": 2, "completion": "é'.encode()[:-1])
    assert run(**tree(checkpoint, questions, out, steps=2)).step == 2
    assert path.read_bytes().startswith(whole)
    assert [line["step"] for line in read_metrics(path)] == [1] * 8 + [2] * 8


def test_a_reward_function_that_fails_costs_no_step(tmp_path, checkpoint, questions):
    settings = {"steps": 4, "prompts": 2}
    run(**tree(checkpoint, questions, tmp_path / "straight", **settings))
    out, screen = tmp_path / "run", Screen()
    failing = tree(checkpoint, questions, out, **settings)
    failing["rewards"] = [{"function": failing["rewards"][0].replace("vowels", "fails_on_the_third_call")}]
    with pytest.raises(ValueError, match="cannot parse"):
        run(screen, **failing)
    assert f"saved {out / 'checkpoint-2'}" in screen.getvalue()
    resumed = run(**tree(checkpoint, questions, out, **settings))
    assert (resumed.resumed_from, resumed.step) == (out / "checkpoint-2", 4)
    assert metrics(out, "reward") == metrics(tmp_path / "straight", "reward")


@pytest.mark.parametrize(
    "habit",
    [
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"epsilon_cutoff": 0.5},
        {"sequence_bias": [[[5], 50.0]]},
        {"watermarking_config": {"bias": 9.0}},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"temperature": 0.1, "top_k": 2, "top_p": 0.1, "repetition_penalty": 5.0},
    ],
    ids=lambda habit: next(iter(habit)),
)
def test_the_checkpoints_habits_of_sampling_are_left_out(tmp_path, checkpoint, questions, habit):
    """``generate`` would follow its generation_config.json where the trainer says nothing."""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | {"do_sample": True} | habit))
    for path, out in ((checkpoint, tmp_path / "without"), (folder, tmp_path / "with")):
        run(**tree(path, questions, out, steps=1))
    assert (tmp_path / "with" / "completions.jsonl").read_bytes() == (
        tmp_path / "without" / "completions.jsonl"
    ).read_bytes()


def test_fewer_prompts_than_a_step_takes_are_refused(tmp_path, checkpoint):
    """trl would end after no step, and the adapter would be saved as it was drawn."""
    few = prompts(tmp_path / "few.jsonl", count=1)
    with pytest.raises(ConfigError, match=r"holds 1 prompts, and a step takes 2 of them: `train\.prompts: 2`"):
        run(**tree(checkpoint, few, tmp_path / "run"))
    screen = Screen()
    run(screen, dry_run=True, **tree(checkpoint, prompts(tmp_path / "odd.jsonl", count=5), tmp_path / "odd"))
    assert "1 of them, drawn anew in each pass, make no whole step" in screen.getvalue()


def test_rewards_that_never_apply_teach_nothing_and_break_nothing(tmp_path, checkpoint, questions):
    changed = tree(checkpoint, questions, tmp_path / "run", steps=1)
    changed["rewards"] = [changed["rewards"][0].replace("vowels", "never")]
    assert run(**changed).step == 1
    assert metrics(tmp_path / "run", "reward") == [None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("eos", r"has no eos_token, so no completion could end"),
        ("rows", r"token of id \d+, and the model has 200 embed"),
    ],
)
def test_a_tokenizer_that_does_not_go_with_the_model_is_refused(tmp_path, questions, change, message):
    folder, tokenizer = tmp_path / "model", byte_tokenizer()
    fields = {"vocab_size": 200, "eos_token_id": 199, "pad_token_id": 198} if change == "rows" else {}
    Qwen3MoeForCausalLM(tiny_config(**fields)).save_pretrained(folder)
    if change == "eos":
        tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=message):
        run(**tree(folder, questions, tmp_path / "run"))


def test_several_steps_on_the_same_completions(tmp_path, checkpoint, questions):
    out = tmp_path / "run"
    run(**tree(checkpoint, questions, out, steps=4, iterations=2, lr=5e-2))
    lines = read_metrics(out / "completions.jsonl")
    assert sorted({line["step"] for line in lines}) == [1, 3]
    # Where the policy has moved on, the difference is drift and not disagreement: it is compared at synchronisations.
    records = read_metrics(out / "metrics.jsonl")
    assert ["agreement_worst" in record for record in records] == [True, False, True, False]
    assert all(record["agreement_worst"] < 1e-4 for record in records if "agreement_worst" in record)
    assert max(record["clip_ratio"] for record in records) > 0


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is optional")
def test_states_of_8_bits(tmp_path, checkpoint, questions):
    out = tmp_path / "run"
    config = tree(checkpoint, questions, out, optimizer="adamw_8bit", save_every=1)
    # A rank at which tensors are large enough for torchao to quantize their states.
    config["lora"] |= {"r": 64}
    run(**config)
    assert max(metrics(out, "agreement_worst")) < 1e-4
    states = torch.load(out / "checkpoint-3" / "optimizer.pt", weights_only=False)["state"].values()
    assert any("OptimState8bit" in type(held["exp_avg"]).__name__ for held in states)


def test_attention_is_the_one_that_was_asked_for(tmp_path, checkpoint, questions, monkeypatch):
    asked = []
    real = octavo.load_model

    def load(*args, **options):
        model = real(*args, **options)
        asked.append(model.config._attn_implementation)
        return model

    monkeypatch.setattr(octavo, "load_model", load)
    config = tree(checkpoint, questions, tmp_path / "run", steps=1)
    config["model"] |= {"attention": "eager"}
    run(**config)
    assert asked == ["eager"]
    assert metrics(tmp_path / "run", "agreement_worst")[0] < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_are_at_the_sampling_temperature(tmp_path, dtype):
    """On a model whose logits differ: one that is sampled at 0.5 and scored at 1 is 0.4 nats apart."""
    words = write_jsonl(tmp_path / "words.jsonl", [{"prompt": f"{word},"} for word in WORDS])
    changed = tree(octavo.demo.checkpoint("dense-tiny"), words, tmp_path / "run", steps=2, router_aux_loss=None)
    changed["model"]["dtype"] = dtype
    changed["rollout"] |= {"temperature": 0.5}
    changed["train"] |= {"precision": "bf16" if dtype == "bfloat16" else "float32"}
    run(**changed)
    # bfloat16 has 8 bits of mantissa, and logits of 10 are rounded by 0.03.
    limit = 1e-4 if dtype == "float32" else 0.05
    assert all(apart < limit for apart in metrics(tmp_path / "run", "agreement_mean"))


def test_the_documented_configuration_is_one():
    text = (ROOT / "docs" / "grpo.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = check_config(GrpoConfig, yaml.safe_load(block))
    assert [reward.function for reward in config.rewards] == ["exact_match", "format", "my_rewards.py:short_enough"]
    (function,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(function, names)
    assert names["short_enough"](["a", "b" * 300]) == [1, 0]


def test_rewards_are_weighed_and_see_the_columns(tmp_path, checkpoint, questions):
    own = f"{tree(checkpoint, questions, tmp_path)['rewards'][0].rpartition(':')[0]}:length_of_answer"
    changed = tree(checkpoint, questions, tmp_path / "run", steps=1)
    changed["rewards"] = [
        {"function": own, "weight": 2.0, "arguments": {"times": 3}},
        {"function": "exact_match", "name": "same"},
        {"function": "format", "name": "short", "arguments": {"pattern": ".{0,3}"}, "weight": 0.5},
    ]
    run(**changed)
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    parts = (record["reward_length_of_answer"], record["reward_same"], record["reward_short"])
    assert record["reward"] == pytest.approx(2 * parts[0] + parts[1] + 0.5 * parts[2])
    answers = {f"say {index}": "ab" * (index % 3) for index in range(12)}
    for line in read_metrics(tmp_path / "run" / "completions.jsonl"):
        assert line["rewards"]["length_of_answer"] == 3 * len(answers[line["prompt"]])


def test_steps_without_a_difference_in_reward_prove_nothing_and_break_nothing(tmp_path, checkpoint, questions):
    screen = Screen()
    changed = tree(checkpoint, questions, tmp_path / "run")
    changed["rewards"] = [{"function": "format", "arguments": {"pattern": "no model writes this"}}]
    assert run(screen, **changed).step == 3
    assert "tensors proven" not in screen.getvalue()
    assert metrics(tmp_path / "run", "groups_without_signal") == [1, 1, 1]
    assert metrics(tmp_path / "run", "grad_norm") == [0, 0, 0]


def test_steps_whose_completions_are_all_masked_prove_nothing_and_break_nothing(tmp_path, checkpoint, questions):
    """They have advantages, and no gradient: the adapter is not to blame."""
    screen = Screen()
    assert run(screen, **tree(checkpoint, questions, tmp_path / "run", mask_truncated=True)).step == 3
    assert "tensors proven" not in screen.getvalue()
    assert metrics(tmp_path / "run", "completions_truncated")[0] == 1
    assert metrics(tmp_path / "run", "grad_norm")[0] == 0
    assert metrics(tmp_path / "run", "reward_std")[0] > 0


def test_a_sampler_that_disagrees_stops_the_run_before_a_step(tmp_path, questions):
    glm = octavo.demo.checkpoint("glm-tiny")
    changed = tree(glm, questions, tmp_path / "run", steps=1)
    changed["rollout"] |= {"numerics": "fp8", "stop_mean": 1e-3}
    with pytest.raises(AgreementError, match=r"nats per token on average.*rollout\.stop_mean: 0\.001.*numerics"):
        run(**changed)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    allowed = tree(glm, questions, tmp_path / "allowed", steps=1)
    allowed["rollout"] |= {"numerics": "fp8", "stop_mean": None}
    run(**allowed)
    (apart,) = metrics(tmp_path / "allowed", "agreement_mean")
    assert apart > 1e-3, "the same differences, logged"
    same = tree(glm, questions, tmp_path / "same", steps=1)
    run(**same)
    (close,) = metrics(tmp_path / "same", "agreement_worst")
    assert close < 1e-3 < apart


def test_the_worst_token_can_stop_a_run_too(tmp_path, checkpoint, questions):
    changed = tree(checkpoint, questions, tmp_path / "run")
    changed["rollout"] |= {"stop_worst": 1e-12}
    with pytest.raises(AgreementError, match=r"rollout\.stop_worst: 1e-12"):
        run(**changed)


def test_the_verb_prints_the_result_as_json(tmp_path, checkpoint, questions):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree(checkpoint, questions, tmp_path / "run")))
    done = CliRunner().invoke(app, ["grpo", str(path), "--json", "--set", "train.steps=1"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["step"] == 1
    assert result["reward"] == metrics(tmp_path / "run", "reward")[0]
    dry = CliRunner().invoke(app, ["grpo", str(path), "--dry-run", "--set", f"out={tmp_path / 'dry'}"])
    assert dry.exit_code == 0
    assert "Dry run" in dry.output
    assert "reward vowels" in dry.output
    assert not (tmp_path / "dry" / "completions.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train": {"num_generations": 4}},
            r"`train\.num_generations` is not a key; did you mean `train\.completions`",
        ),
        ({"train": {"prompts": 3, "batch_size": 5}}, r"`batch_size` 5 does not divide the 3 x 8 completions"),
        ({"train": {"iterations": 2}, "rollout": {"replay": True}}, r"`rollout\.replay` needs `train\.iterations: 1`"),
        ({"rollout": {"server": "localhost:8000"}}, r"begins with http"),
        ({"rollout": {"server": "http://localhost:eight"}}, r"has a host and, if any, a port that is a number"),
        ({"rollout": {"server": "http://x", "replay": True}}, r"a server does not tell"),
        ({"rollout": {"server": "http://x", "numerics": "fp8"}}, r"`numerics` of a server are its own"),
        ({"rollout": {"server": "http://x", "graphs": True}}, r"a server has its own"),
        ({"rollout": {"replay": True, "graphs": True}}, r"which a CUDA graph skips"),
        ({"rewards": []}, r"rewards"),
        ({"rollout": {"temperature": 0}}, r"rollout\.temperature"),
        ({"lora": {"dtype": "bfloat16"}, "train": {"optimizer": "adamw_8bit"}}, r"`lora\.dtype` of GRPO is float32"),
        ({"train": {"offload_hidden_states": True}}, r"`train\.offload_hidden_states` is for `octavo sft`"),
        ({"train": {"activation_offloading": True}}, r"`train\.activation_offloading` is not a key"),
    ],
)
def test_what_is_wrong_in_the_configuration_is_said_before_anything_loads(tmp_path, change, message):
    path = tmp_path / "run.yaml"
    whole = {"model": "somewhere", "data": "prompts.jsonl", "rewards": ["exact_match"], "out": "run"} | change
    path.write_text(yaml.safe_dump(whole))
    with pytest.raises(ConfigError, match=message):
        read_config(GrpoConfig, path)


def test_a_dense_model_has_nothing_to_replay(tmp_path, questions):
    fields = {
        name: value
        for name, value in tiny_config().to_dict().items()
        if name
        in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    }
    folder = tmp_path / "dense"
    Qwen3ForCausalLM(Qwen3Config(**fields, num_hidden_layers=1, pad_token_id=257, eos_token_id=256)).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    changed = tree(folder, questions, tmp_path / "run", router_aux_loss=None)
    changed["rollout"] |= {"replay": True}
    with pytest.raises(ConfigError, match="this model has none"):
        run(**changed)
