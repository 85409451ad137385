"""``octavo chat``: what was trained answers."""

import json

import pytest
from peft import PeftModel
from typer.testing import CliRunner

import octavo
from octavo.cli.main import app
from octavo.errors import ConfigError
from octavo.train.chat import Chat, Sampling, find_adapter, load_chat

from .tiny import byte_tokenizer, train, tree, write_jsonl


@pytest.fixture(scope="module")
def run(tmp_path_factory, checkpoint):
    """A run that learned one answer by heart."""
    folder = tmp_path_factory.mktemp("chat")
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "an owl"}]
    data = write_jsonl(folder / "a.jsonl", [{"messages": turns}] * 8)
    # Only bytes are read off lm_head, so it is trained as well: a random model has nothing to say by itself.
    config = tree(checkpoint, data, folder / "run", steps=60, batch_size=8, lr=3e-2)
    config["lora"] |= {"modules_to_save": ["lm_head"]}
    train(**config)
    return folder / "run"


def test_what_was_learned_is_said_from_the_run_the_adapter_or_a_checkpoint(run):
    for place in (run, run / "adapter", run / "checkpoint-60"):
        chat = load_chat(str(place), dtype="float32")
        pieces: list[str] = []
        answer = chat.answer([{"role": "user", "content": "who?"}], Sampling(max_new_tokens=20), pieces.append)
        assert answer.text == "an owl" == "".join(pieces)
        # Six bytes and the end of the turn, where it stops.
        assert answer.tokens == 7


def test_the_verb_answers_once_as_text_and_as_json(run):
    arguments = ["chat", str(run), "--prompt", "who?", "--dtype", "float32", "--max-new-tokens", "20"]
    plain = CliRunner().invoke(app, arguments)
    assert (plain.exit_code, plain.stdout.splitlines()[-1]) == (0, "an owl")
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout) | {"seconds": 0} == {
        "prompt": "who?",
        "answer": "an owl",
        "tokens": 7,
        "seconds": 0,
    }


def test_the_verb_holds_a_conversation_until_an_empty_line(run):
    arguments = ["chat", str(run), "--dtype", "float32", "--max-new-tokens", "20"]
    result = CliRunner().invoke(app, arguments, input="who?\n/reset\nwho?\n\n")
    assert result.exit_code == 0
    assert result.stdout.count("an owl") == 2


def test_graphs_that_were_asked_for_and_cannot_be_are_an_error(run):
    result = CliRunner().invoke(app, ["chat", str(run), "--prompt", "who?", "--dtype", "float32", "--graphs", "true"])
    assert result.exit_code == 1
    assert "graphs need CUDA" in str(result.exception) + result.output


def test_json_without_a_prompt_is_a_wrong_call(run):
    assert CliRunner().invoke(app, ["chat", str(run), "--json"]).exit_code == 2


def test_sampling_follows_the_seed(run):
    arguments = [
        "chat",
        str(run),
        "--prompt",
        "hm",
        "--dtype",
        "float32",
        "--temperature",
        "5",
        "--max-new-tokens",
        "20",
    ]
    answers = [CliRunner().invoke(app, [*arguments, "--seed", seed]).stdout for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


def test_without_a_template_the_text_is_continued(checkpoint):
    chat = Chat(octavo.load_model(checkpoint), byte_tokenizer(None))
    assert chat.answer([{"role": "user", "content": "abc"}], Sampling(max_new_tokens=3)).tokens <= 3


def test_what_is_no_adapter_is_told_apart(tmp_path, run):
    with pytest.raises(ConfigError, match="holds no adapter"):
        find_adapter(str(tmp_path))
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(ConfigError, match=r"not finished; its last checkpoint is .*checkpoint-10"):
        find_adapter(str(tmp_path))
    with pytest.raises(ConfigError, match="There is no adapter at"):
        find_adapter(str(tmp_path / "nothing"))
    assert find_adapter("org/name") == "org/name"
    with pytest.raises(ConfigError, match="neither an adapter's folder nor the id"):
        load_chat("no-such-org/no-such-adapter")


def test_a_base_that_moved_is_asked_for(tmp_path, run, checkpoint):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (run / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/moved/away"}))
    with pytest.raises(ConfigError, match="trained on /moved/away, which is not there"):
        load_chat(str(adapter))
    assert isinstance(load_chat(str(adapter), base=str(checkpoint)).model, PeftModel)
