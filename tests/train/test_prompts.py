"""Prompts: what a row may be, and what is said of one that is not."""

import pytest

from octavo.errors import ConfigError
from octavo.train.grpo_config import PromptsSection
from octavo.train.prompts import load_prompts, prompt_ids

from .tiny import byte_tokenizer, chat, write_jsonl

TOKENIZER = byte_tokenizer()


def load(path, rows, **section):
    return load_prompts(PromptsSection(train=str(write_jsonl(path / "p.jsonl", rows)), **section), TOKENIZER)


def test_text_and_its_columns(tmp_path):
    prompts = load(tmp_path, [{"prompt": "ab", "answer": "x"}, {"prompt": "abcd", "answer": "y", "kind": "z"}])
    assert (len(prompts), prompts.longest, set(prompts.columns)) == (2, 4, {"answer", "kind"})
    assert prompts.dataset[1] == {"prompt": "abcd", "answer": "y", "kind": "z"}


def test_the_last_answer_of_a_chat_becomes_a_column(tmp_path):
    prompts = load(tmp_path, [chat(0), chat(1)])
    assert prompts.columns == ("answer",)
    assert prompts.dataset[1] == {"prompt": [{"role": "user", "content": "say 1"}], "answer": "abab1"}
    assert TOKENIZER.decode(prompt_ids(TOKENIZER, prompts.dataset[1]["prompt"])) == "<|user|>say 1<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"question": "b"}], r"line 2: neither `prompt` nor `messages`, found `question`"),
        ([{"prompt": ""}], r"line 1: `prompt` is empty"),
        ([{"prompt": []}], r"`prompt` is empty, expected a list of turns"),
        ([{"messages": [{"role": "user", "content": "a"}]}], r"must be a question and the assistant's answer"),
        ([chat(0) | {"answer": "b"}], r"`answer` is there beside `messages`"),
        ([{"prompt": "a", "completions": 1}], r"the column `completions` has a name that trl takes for itself"),
        ([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2.5}], r"column `answer` .* 1 would become 1\.0"),
        ([{"prompt": "a", "completion": "b"}], r"the column `completion` has a name that trl takes for itself"),
        ([{"prompt": "a", "image": "b.png"}], r"`image` would not reach the model"),
        ([chat(0) | {"tools": [{"type": "function"}]}], r"`tools` would not reach the model"),
        ([{"prompt": "a"}, {"prompt": "\ud83d"}], r"line 2 holds half a character, '\\ud83d'"),
        (
            [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}],
            r"line 2 holds a conversation and line 1 text",
        ),
        (
            [{"prompt": "a"}, {"prompt": "b" * 40}],
            r"1 prompts .* longer than `data\.max_prompt_tokens: 32`.*\n.*line 2: 40",
        ),
        (["text"], r"expected an object with `prompt` or `messages`, found str"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path, rows, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, rows, max_prompt_tokens=32)


def test_a_conversation_needs_a_template(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [chat(0)])
    with pytest.raises(ConfigError, match="no chat template"):
        load_prompts(PromptsSection(train=str(path)), byte_tokenizer(None))
