"""Reward functions as a user would write them, in a file that is no part of a package."""

import numpy

_calls = 0


def vowels(completions):
    """The share of vowels: it names what it wants of what trl gives."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def length_of_answer(completions, answer, *, times, **columns):
    return [times * len(text) for text in answer]


def numpy_ones(completions):
    return list(numpy.ones(len(completions), dtype=numpy.float32))


def fails_on_the_third_call(completions):
    global _calls
    _calls += 1
    if _calls == 3:
        raise ValueError("an answer that it cannot parse")
    return vowels(completions)


def never(completions, **columns):
    return [None for _ in completions]


def too_few(completions, **columns):
    return [1.0]


def not_a_number(completions, **columns):
    return [float("nan") for _ in completions]


def needs_more(completions, solution):
    return [0.0 for _ in completions]


async def later(completions, **columns):
    return [0.0 for _ in completions]


NOT_A_FUNCTION = 3
