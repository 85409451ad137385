"""Packed rows of one shape: the same losses, counts and attention, and layers that are replayed."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import octavo
from octavo.integrations import recorder
from octavo.train.even_rows import EvenRows, even_shape
from octavo.train.metrics import read_metrics
from octavo.train.packed import packed_attention
from tests.integrations.test_graph_layers import DoneAgain
from tests.train.tiny import Screen, chat, train, tree, write_jsonl

PAD, MOST = 7, 8


def collate(lengths, full):
    """trl's batch of one packed row, and the same made even."""
    ids = list(range(10, 10 + sum(lengths)))
    examples = [{"input_ids": ids, "labels": ids, "seq_lengths": lengths}]
    stock = DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True)
    return stock(examples), EvenRows(stock, full, MOST)(examples)


@pytest.mark.parametrize("lengths", [[20, 13, 27], [64], [1] * 57, [30, 34]])
def test_a_row_keeps_its_examples_and_gets_one_of_padding(lengths):
    plain, even = collate(lengths, 64)
    tokens = sum(lengths)
    # a token of the row itself: not every tokenizer's padding is one of the model's
    for name, filling in (("input_ids", 10), ("labels", -100)):
        assert even[name].shape == (1, 64)
        assert torch.equal(even[name][:, :tokens], plain[name])
        assert (even[name][:, tokens:] == filling).all()
    assert even["attention_mask"].tolist() == [[1] * tokens + [0] * (64 - tokens)]
    assert torch.equal(even["position_ids"][0, tokens:], torch.arange(64 - tokens))
    starts, before = even["cu_seq_lens_q"], plain["cu_seq_lens_q"]
    assert torch.equal(starts[: len(before)], before)
    assert (starts[len(before) :] == 64).all()
    # of as many examples as other rows, and one of padding
    assert starts.numel() - 1 == max(MOST, len(lengths)) + 1
    assert even["max_length_q"] == even["max_length_k"] == 64


@pytest.mark.parametrize("lengths", [[20, 13], [55], [60, 5]])
def test_a_row_that_lacks_much_or_has_too_much_is_left_alone(lengths):
    plain, even = collate(lengths, 64)
    assert plain.keys() == even.keys()
    assert all(torch.equal(torch.as_tensor(plain[key]), torch.as_tensor(even[key])) for key in plain)


def test_attention_does_not_see_the_padding():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 64, 8, generator=generator) for _ in range(3))
    plain, even = collate([20, 13, 27], 64)

    def attended(batch, tokens):
        given = {name: batch[name] for name in ("cu_seq_lens_q", "max_length_q")}
        return packed_attention(
            torch.nn.Module(),
            query[:, :, :tokens],
            key[:, :, :tokens],
            value[:, :, :tokens],
            None,
            scaling=0.3,
            **given,
        )[0]

    assert torch.equal(attended(plain, 60), attended(even, 64)[:, :60])


def test_a_packed_run_is_replayed_and_learns_the_same(tmp_path, checkpoint, monkeypatch):
    """With the load-balancing loss and the counts of experts' tokens, which see no padding."""
    monkeypatch.setitem(recorder.RECORDERS, "cpu", DoneAgain)
    shapes = []
    monkeypatch.setattr(octavo, "compile_layers", lambda model, shape: shapes.append(shape))
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat(index) for index in range(160)])

    def run(name, **options):
        config = tree(checkpoint, chats, tmp_path / name, router_aux_loss=0.1, steps=8, compile=True, **options)
        config["data"] |= {"packing": True, "max_length": 256}
        screen = Screen()
        train(screen, **config)
        lines = [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in line]
        return lines, screen.getvalue()

    want, _ = run("plain", graphs=False)
    got, said = run("even", graphs=True)
    assert len(want) == len(got) == 8
    # batches of four
    assert shapes == [None, (1, 4 * 256)]
    for key in ("loss", "grad_norm", "expert_load"):
        assert [line[key] for line in got] == pytest.approx([line[key] for line in want], rel=1e-4), key
    assert "CUDA graphs: 2 recordings, 12 forwards replayed; 4 not: the first 2 forwards of a kind" in said


def test_the_shape_is_that_of_the_longest_row_and_of_the_examples_of_most():
    assert even_shape([[5, 5], [11], [1] * 9]) == (11, 9)
    assert even_shape([[2, 2]] * 19 + [[1] * 50]) == (50, 2)
