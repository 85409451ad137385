"""``octavo demo``: a real model learns, and the verb says so only if it is true."""

import json

import pytest
from typer.testing import CliRunner

import octavo
from octavo.cli.main import app
from octavo.errors import CheckpointError
from octavo.train.folder import is_adapter


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["demo", *arguments])


def test_a_few_steps_are_enough_to_learn_and_everything_is_shown(tmp_path):
    done = invoke("--out", str(tmp_path / "run"), "--steps", "8", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["learned"]
    assert result["eval_loss_after"] < 0.85 * result["eval_loss_before"]
    assert result["fell"] == pytest.approx(1 - result["eval_loss_after"] / result["eval_loss_before"])
    assert is_adapter(tmp_path / "run" / "adapter")
    assert result["adapter"] == str(tmp_path / "run" / "adapter")
    assert len(result["completions"]) == 2
    assert all(shown["before"] != shown["after"] for shown in result["completions"])
    # FP8 halves the matrices it stores; embeddings and one layer of the model are bf16 in the file.
    assert result["weights_measured"] < 0.75 * result["weights_in_bf16"]
    for shown in ("FP8 channel", "routed experts", "what it learned", "dictionary:", "calculated from its headers"):
        assert shown in done.stderr


def test_a_demo_that_does_not_learn_fails(tmp_path):
    """The first step of a warm-up has a rate of zero."""
    done = invoke("--out", str(tmp_path / "run"), "--steps", "1")
    assert done.exit_code == 1
    assert "0.0 % lower (asked for: 15 %)" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("model", ["glm-tiny", "qwen-tiny"])
def test_the_whole_demo_within_three_minutes(tmp_path, model):
    done = invoke("--out", str(tmp_path / "run"), "--model", model, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["seconds"] < 180
    assert result["fell"] > 0.4


def test_models_are_found_by_name():
    assert (octavo.demo.checkpoint("qwen-tiny") / "model.safetensors").is_file()
    with pytest.raises(
        CheckpointError, match="No model named 'other' ships with octavo; there is dense-tiny, glm-tiny, qwen-tiny"
    ):
        octavo.demo.checkpoint("other")


def test_no_meaning_is_in_both_parts_of_the_data():
    def meanings(part: str) -> set[str]:
        lines = octavo.demo.data(part).read_text().splitlines()
        return {json.loads(line)["messages"][1]["content"] for line in lines}

    assert len(meanings("train")) > 2500
    assert not meanings("train") & meanings("eval")
