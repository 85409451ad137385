"""`train.graphs`: a run on recorded layers is the run on checkpointed ones, to the last bit."""

import pytest

from octavo.errors import ConfigError
from octavo.integrations import recorder
from octavo.train.config import parse_config
from octavo.train.metrics import read_metrics
from tests.integrations.test_graph_layers import DoneAgain
from tests.train.tiny import Screen, chat, train, tree, write_jsonl


def records(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_recorded_run_has_the_same_losses_and_counts(tmp_path, checkpoint, monkeypatch, accumulation):
    """With the load-balancing loss, whose router logits are outputs, and the count of experts' tokens."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", DoneAgain)
    # Of one length, and not alike.
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat(10 + 5 * index) for index in range(16)])
    options = {"router_aux_loss": 0.1, "steps": 5, "grad_accumulation": accumulation}
    train(**tree(checkpoint, chats, tmp_path / "plain", **options))
    screen = Screen()
    train(screen, **tree(checkpoint, chats, tmp_path / "recorded", graphs=True, **options))
    # two layers; two forwards of each come before
    assert f"CUDA graphs: 2 recordings, {2 * (5 * accumulation - 2)} forwards replayed; 4 not:" in screen.getvalue()
    want, got = records(tmp_path / "plain"), records(tmp_path / "recorded")
    assert len(want) == 5
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in got] == [line[key] for line in want], key
    assert [line["expert_load"] for line in got] == pytest.approx([line["expert_load"] for line in want])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"graphs": True, "gradient_checkpointing": "none"}}, "take the place of gradient checkpointing"),
        ({"model": {"path": "somewhere", "experts": "host"}, "train": {"graphs": True}}, "cannot wait for the copies"),
        ({"train": {"graphs": True}, "lora": {"dropout": 0.1}}, r"`lora.dropout` is 0.1; set it to 0"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({"model": "somewhere", "data": "some.jsonl", "out": "out", **change})
