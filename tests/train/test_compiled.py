"""`train.compile`: a run on compiled layers is the run on eager ones."""

from functools import partial

import pytest
import torch

import octavo
from octavo.train.metrics import read_metrics
from tests.integrations.test_compiled_order import rounding
from tests.train.tiny import Screen, chat, train, tree, write_jsonl


def records(out):
    return [line for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_a_compiled_run_has_the_same_losses_and_counts(tmp_path, checkpoint, chats, monkeypatch):
    """With the load-balancing loss, whose router logits leave the graph, and the count of experts' tokens."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"precision": "float32", "router_aux_loss": 0.1, "steps": 3}
    train(**tree(checkpoint, chats, tmp_path / "eager", **options))
    assert not torch._dynamo.utils.counters["stats"]
    # inductor takes a minute and computes the same
    monkeypatch.setattr(octavo, "compile_layers", partial(octavo.compile_layers, backend="aot_eager"))
    train(**tree(checkpoint, chats, tmp_path / "compiled", compile=True, **options))
    # a dense layer and one of experts, each for batches with a mask and without
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]
    want, got = records(tmp_path / "eager"), records(tmp_path / "compiled")
    assert len(want) == 3
    for key in ("loss", "grad_norm", "expert_load", "expert_load_worst"):
        assert [line[key] for line in got] == pytest.approx([line[key] for line in want], rel=1e-4), key


def test_an_interrupted_compiled_run_resumes_to_bit_equal_losses(tmp_path, checkpoint, monkeypatch):
    """Where no two graphs round alike, and the resumed run begins with rows of a length that the other met later."""
    monkeypatch.setattr(octavo, "compile_layers", partial(octavo.compile_layers, backend=rounding))
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat(10 ** (index % 7)) for index in range(24)])
    settings = {"steps": 6, "batch_size": 2, "seed": 3, "compile": True}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    torch._dynamo.reset()
    train(**tree(checkpoint, chats, straight, **settings))
    torch._dynamo.reset()
    assert train(Screen(after="step 2/6"), **tree(checkpoint, chats, resumed, **settings)).step == 3
    torch._dynamo.reset()
    assert train(**tree(checkpoint, chats, resumed, **settings)).resumed_from == resumed / "checkpoint-3"
    for key in ("loss", "grad_norm"):
        want, got = ([line[key] for line in records(out)] for out in (straight, resumed))
        assert len(want) == 6
        assert got == want, key
