"""The rendered example: text and mask are those of the tokens, and nothing is lost between spans."""

from octavo.train.example import IGNORED, render_example

from .tiny import byte_tokenizer


def test_spans_follow_the_mask_and_join_to_the_text():
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab déjà vu")["input_ids"]
    # Bytes: é and à are two tokens each.
    labels = [IGNORED] * 3 + ids[3:6] + [IGNORED] * 3 + ids[9:]
    example = render_example(ids, labels, tokenizer)
    assert [span.tokens for span in example.spans] == [3, 3, 3, 3]
    assert example.counted == 6
    assert example.tokens == 12
    assert str(example) == "ab ⟦dé⟧jà⟦ vu⟧"
    assert example.rich().plain == "ab déjà vu"


def test_the_first_token_never_counts_because_nothing_predicts_it():
    tokenizer = byte_tokenizer()
    ids = tokenizer("abc")["input_ids"]
    assert str(render_example(ids, ids, tokenizer)) == "a⟦bc⟧"


def test_a_long_span_is_shortened_in_the_middle():
    tokenizer = byte_tokenizer()
    ids = tokenizer("x" * 5000)["input_ids"]
    shown = str(render_example(ids, ids, tokenizer))
    assert len(shown) < 1400
    assert "3799 characters" in shown
