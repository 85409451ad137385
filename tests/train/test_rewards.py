"""Reward functions: the two that come along, and a user's by import path."""

from pathlib import Path

import pytest

from octavo.errors import ConfigError
from octavo.train import rewards
from octavo.train.grpo_config import RewardSection
from octavo.train.rewards import RewardError, exact_match, load_rewards, normalized

OWN = Path(__file__).with_name("own_rewards.py")


def section(function: str, **fields: object) -> RewardSection:
    return RewardSection(function=function, **fields)


def call(function: str, completions: list[object], columns: dict[str, list[object]] | None = None, **fields: object):
    (reward,) = load_rewards([section(function, **fields)], list(columns or {}))
    given = {"completion_ids": [[1]] * len(completions), "trainer_state": None, "log_extra": None, "log_metric": None}
    return reward(["question"] * len(completions), completions, **given, **(columns or {}))


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("The  Answer, is: 42.", "answer is 42"),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "full width"),
        ("STRASSE", "straße"),
        ("an apple", "apple"),
        ("3.14", "3.14"),
        ("(-5).", "\N{MINUS SIGN}5"),
        ("-$5", "-5"),
        ("(A)", "a"),
        ("the vitamin A.", "Vitamin a"),
    ],
)
def test_normalized(text, same_as):
    assert normalized(text) == normalized(same_as)


# Answers that must not be those of an empty completion, or of another number.
SIGNS_AND_ARTICLES = [
    ("-5", "5"),
    (".5", "5"),
    ("-.5", ".5"),
    ("A", ""),
    ("a", "the"),
    ("Vitamin A", "vitamin"),
    ("+", "-"),
]


@pytest.mark.parametrize(
    ("text", "other"), [("3.14", "314"), ("-5", "- 5 6"), ("not so", "so"), ("a b", "c"), *SIGNS_AND_ARTICLES]
)
def test_normalized_keeps_apart(text, other):
    assert normalized(text) != normalized(other)


def test_exact_match_of_text_and_of_turns():
    turns = [{"role": "assistant", "content": "The answer."}]
    given = call("exact_match", ["Answer", "other", turns, ""], {"answer": ["answer", "answer", "answer", ""]})
    assert given == [1, 0, 1, 1]
    strict = call(
        "exact_match", [" Answer", "answer "], {"key": ["answer"] * 2}, arguments={"column": "key", "normalize": False}
    )
    assert strict == [0, 1]


def test_exact_match_does_not_apply_to_a_row_without_an_answer():
    assert call("exact_match", ["None", "", "a"], {"answer": [None, None, "a"]}) == [None, None, 1]


def test_exact_match_says_which_column_it_lacks():
    with pytest.raises(RewardError, match="column `answer`, which the data does not have"):
        exact_match(["x"])


def test_format_matches_all_of_the_text():
    completions = [
        "v. To go.",
        " v. To go.\n",
        "v. To go",
        "so v. To go.",
        "v. To\ngo.",
        [{"role": "assistant", "content": "v. a."}],
    ]
    assert call("format", completions, arguments={"pattern": r"v\. .+\."}) == [1, 1, 0, 0, 1, 1]


def test_a_function_of_the_user_gets_what_it_names():
    assert call(f"{OWN}:vowels", ["ab", "xyz", "", "aeiou"]) == [0.5, 0, 0, 1]
    assert call(f"{OWN}:length_of_answer", ["", ""], {"answer": ["ab", "abc"]}, arguments={"times": 2}) == [4, 6]
    assert call(f"{OWN}:never", ["x"]) == [None]
    assert call("tests.train.own_rewards:vowels", ["ab"]) == [0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "vowels"}, r"'vowels' is neither exact_match nor format; write .* as `package\.module:name`"),
        ({"function": "no.such.package:f"}, r"no module 'no\.such\.package'.*`file\.py:name`"),
        ({"function": "nowhere.py:f"}, r"there is no file .*nowhere\.py"),
        ({"function": f"{OWN}:vowls"}, r"has no function 'vowls'; it has vowels, length_of_answer"),
        ({"function": f"{OWN}:NOT_A_FUNCTION"}, r"has no function 'NOT_A_FUNCTION'"),
        ({"function": f"{OWN}:later"}, r"is asynchronous"),
        ({"function": f"{OWN}:needs_more"}, r"missing a required argument: 'solution'.*columns of the data \(answer\)"),
        ({"function": f"{OWN}:vowels", "arguments": {"tmies": 3}}, r"got an unexpected keyword argument 'tmies'"),
        ({"function": f"{OWN}:never", "arguments": {"answer": 3}}, r"the argument `answer` .* from the data"),
        ({"function": f"{OWN}:never", "name": "std"}, r"called 'std', and `reward_std` is another metric"),
        ({"function": "exact_match", "arguments": {"column": "key"}}, r"the column 'key', and the data has answer"),
        ({"function": "format"}, r"format needs `arguments: \{pattern"),
        ({"function": "format", "arguments": {"pattern": "("}}, r"'\(' of format is no regular expression"),
    ],
)
def test_what_cannot_be_called_is_said_before_training(fields, message):
    with pytest.raises(ConfigError, match=message):
        load_rewards([RewardSection(**fields)], ["answer"])


def test_two_of_one_name():
    both = [section("format", arguments={"pattern": "a"}), section("format", arguments={"pattern": "b"})]
    with pytest.raises(ConfigError, match=r"format is there twice.*Give each a `name`"):
        load_rewards(both, [])
    named = [both[0], both[1].model_copy(update={"name": "other"})]
    assert [reward.__name__ for reward in load_rewards(named, [])] == ["format", "other"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("too_few", r"gave 1 values for 2 completions"), ("not_a_number", r"gave nan for completion 0 \('x'\)")],
)
def test_an_answer_that_is_no_list_of_numbers(name, message):
    with pytest.raises(RewardError, match=message):
        call(f"{OWN}:{name}", ["x", "y"])


def test_a_module_that_lacks_a_dependency_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_rewards([section("broken_rewards:f")], [])


def test_a_file_that_is_no_python_is_named_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("\ndef f(:\n")
    with pytest.raises(ConfigError, match=r"broken\.py, line 2 is no Python"):
        load_rewards([section(f"{tmp_path / 'broken.py'}:f")], [])


def test_numbers_of_numpy_are_numbers():
    assert call(f"{OWN}:numpy_ones", ["a", "b"]) == [1, 1]


def test_ready_functions_are_those_that_the_configuration_names():
    for name in rewards.READY:
        assert f"`{name}`" in (RewardSection.model_fields["function"].description or "")
