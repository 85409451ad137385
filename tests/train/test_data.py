"""Examples from files: every format, and what is wrong named by file and line."""

import json

import pytest
from datasets import Dataset

from octavo.errors import ConfigError
from octavo.train.config import DataSection
from octavo.train.data import counted_loss, hold_out, load_data, load_examples

from .tiny import chat, write_jsonl

PAIR = {"prompt": "2+2=", "completion": "4"}
TURNS = {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "ho"}]}


@pytest.mark.parametrize(
    ("row", "kind", "loss"),
    [
        (chat(0), "messages", "assistant"),
        (PAIR, "prompt-completion", "completion"),
        (TURNS, "prompt-completion", "completion"),
        ({"text": "once"}, "text", "all"),
    ],
)
def test_the_format_is_found_and_decides_what_counts(tmp_path, row, kind, loss):
    examples = load_examples(str(write_jsonl(tmp_path / "a.jsonl", [row, row])))
    assert examples.format == kind
    assert len(examples) == 2
    assert counted_loss(examples, "auto") == loss
    assert counted_loss(examples, "all") == "all"
    assert examples.dataset[1] == row


def test_lines_are_numbered_as_an_editor_does(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(chat(0)) + "\n\n" + json.dumps(chat(1)) + "\n", encoding="utf-8")
    examples = load_examples(str(path))
    assert [examples.where(index) for index in (0, 1)] == [f"{path}, line 1", f"{path}, line 3"]


def test_columns_that_are_not_used_are_said(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**PAIR, "id": 1}, {**PAIR, "source": "x"}])
    examples = load_examples(str(path))
    assert examples.left_out == ("id", "source")
    assert examples.dataset.column_names == ["prompt", "completion"]


def test_tools_of_any_shape_reach_the_template_as_json(tmp_path):
    tools = [{"name": "add", "parameters": {"a": 1}}], [{"name": "say", "parameters": {"b": ["x"]}}]
    path = write_jsonl(tmp_path / "a.jsonl", [{**chat(0), "tools": tools[0]}, {**chat(1), "tools": tools[1]}, chat(2)])
    column = load_examples(str(path)).dataset["tools"]
    assert [json.loads(text) if text else None for text in column] == [*tools, None]


def test_parquet_and_a_folder_in_the_place_of_a_hub_id(tmp_path):
    rows = [chat(index) for index in range(3)]
    folder = tmp_path / "hub"
    folder.mkdir()
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    from_file = load_examples(str(folder / "train.parquet"))
    from_folder = load_examples(str(folder), split="train")
    assert list(from_file.dataset) == list(from_folder.dataset) == rows
    assert from_file.where(2).endswith("row 3")
    with pytest.raises(ConfigError, match="split 'test'"):
        load_examples(str(folder), split="test")


BROKEN = [
    ("{", "line 2 is not JSON"),
    ("[]", "line 2: expected an object with `messages`, found list"),
    ("{}", "line 2: `messages` missing, found an empty object"),
    ('{"message": []}', "line 2: `messages` missing, found `message`"),
    ('{"messages": []}', "line 2: `messages` is empty"),
    ('{"messages": "hi"}', "line 2: `messages` is str"),
    ('{"messages": ["hi"]}', "line 2: `messages[0]` is str"),
    ('{"messages": [{"content": "hi"}]}', "line 2: `messages[0]` has no `role`, found `content`"),
    ('{"messages": [{"role": "user"}]}', "line 2: `messages[0]` has no `content`"),
    ('{"messages": [{"role": "user", "content": [1]}]}', "line 2: `messages[0]` has `content` of type list"),
]


@pytest.mark.parametrize(("line", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_a_broken_example_is_named_by_file_and_line_with_what_is_missing(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat(0)) + "\n" + line + "\n")
    with pytest.raises(ConfigError) as error:
        load_examples(str(path))
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_many_broken_examples_are_counted_and_the_first_ones_shown(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [PAIR, *[{"prompt": "x"}] * 8])
    with pytest.raises(ConfigError) as error:
        load_examples(str(path))
    assert "8 of 9 examples" in str(error.value)
    assert "and 3 more" in str(error.value)
    assert "line 2: `completion` missing, found `prompt`" in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": []}, "Rename `conversations`"),
        ({"instruction": "x"}, "found `instruction`"),
        ({"prompt": "x", "completion": ""}, "`completion` is empty"),
        ({"prompt": "x", "completion": 3}, "`completion` is int"),
        ({"text": ""}, "`text` is empty"),
    ],
)
def test_other_first_examples_are_refused(tmp_path, row, said):
    with pytest.raises(ConfigError, match=said):
        load_examples(str(write_jsonl(tmp_path / "a.jsonl", [row])))


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.jsonl cannot be read: No such file"):
        load_examples(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(ConfigError, match="holds no example"):
        load_examples(str(write_jsonl(tmp_path / "a.jsonl", [])))
    with pytest.raises(ConfigError, match=r"neither \.jsonl nor \.parquet"):
        load_examples(str(write_jsonl(tmp_path / "a.csv", [])))
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ConfigError, match="not a parquet file"):
        load_examples(str(tmp_path / "a.parquet"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_examples(str(tmp_path / "b.jsonl"))
    with pytest.raises(ConfigError, match="no file here and cannot be loaded from the hub"):
        load_examples("no-such-org/no-such-data")


def test_a_loss_that_the_examples_cannot_have_is_refused(tmp_path):
    pairs = load_examples(str(write_jsonl(tmp_path / "a.jsonl", [PAIR])))
    chats = load_examples(str(write_jsonl(tmp_path / "b.jsonl", [chat(0)])))
    with pytest.raises(ConfigError, match="needs messages"):
        counted_loss(pairs, "assistant")
    with pytest.raises(ConfigError, match="needs a prompt and a completion"):
        counted_loss(chats, "completion")
    mute = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}
    silent = load_examples(str(write_jsonl(tmp_path / "c.jsonl", [chat(0), mute, chat(1)])))
    with pytest.raises(ConfigError, match=r"1 of 3 examples have no assistant turn.*c\.jsonl, line 2"):
        counted_loss(silent, "auto")
    assert counted_loss(silent, "all") == "all"


def test_held_out_examples_are_drawn_by_seed_and_keep_their_lines(tmp_path):
    examples = load_examples(str(write_jsonl(tmp_path / "a.jsonl", [chat(index) for index in range(20)])))
    train, held = hold_out(examples, 0.2, seed=1)
    assert len(train) == 16
    assert len(held) == 4
    assert sorted(train.numbers + held.numbers) == list(range(1, 21))
    for part in (train, held):
        for index in range(len(part)):
            assert part.dataset[index] == chat(part.numbers[index] - 1)
    assert hold_out(examples, 0.2, seed=1)[1].numbers == held.numbers != hold_out(examples, 0.2, seed=2)[1].numbers
    with pytest.raises(ConfigError, match="leaves none to train on"):
        hold_out(examples.select([0]), 0.2, seed=1)


def test_evaluation_from_its_own_file(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [chat(0), chat(1)])
    other = write_jsonl(tmp_path / "b.jsonl", [chat(2)])
    examples, evaluation = load_data(DataSection(train=str(train), eval=str(other)), seed=0)
    assert len(examples) == 2
    assert evaluation is not None
    assert evaluation.dataset[0] == chat(2)
