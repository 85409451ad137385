"""Packed rows of one shape, so that decoder layers can be replayed as CUDA graphs, which hold for one shape each.

What a packed row lacks of its full length, an eighth at most, is one more example that nobody learns from.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from octavo.train.example import IGNORED

# Of its full length: shorter rows, as the last one of a data set, keep their own shape.
_LEAST = 7 / 8


def even_shape(packs: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(Tokens, examples) of a row for a data set whose rows hold examples of these lengths: the longest row, and the
    examples of all but the fullest tenth of rows, since attention takes memory for as many as it is told of.
    """
    counts = sorted(map(len, packs))
    return max(map(sum, packs)), counts[(len(counts) * 9 - 1) // 10]


class EvenRows:
    """A collator whose packed rows are padded to ``length`` tokens if they are nearly that long, and say where
    ``examples`` examples begin, or more if there are more.

    ``collate`` is trl's for rows without padding: one row, and where its examples begin. octavo's packed attention goes
    by these and builds no mask, so ``attention_mask`` [1, length] only keeps padding out of what is counted: the
    load-balancing loss, tokens, and how evenly experts are used.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        length: int,
        examples: int,
    ) -> None:
        self._collate, self._length, self._examples = collate, length, examples

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collate(examples)
        starts: Tensor | None = batch.get("cu_seq_lens_q")
        tokens = batch["input_ids"].shape[1]
        if starts is None or not _LEAST * self._length <= tokens <= self._length:
            return batch
        short = self._length - tokens
        for name, filling in (
            # any token that the model has
            ("input_ids", batch["input_ids"][0, :1].expand(short)),
            ("labels", torch.full((short,), IGNORED)),
            ("position_ids", torch.arange(short)),
            ("seq_idx", torch.full((short,), starts.numel() - 1)),
        ):
            if name in batch:
                batch[name] = torch.cat([batch[name], filling.to(batch[name].dtype)[None]], 1)
        batch["attention_mask"] = (torch.arange(self._length) < tokens).long()[None]
        # one of padding, and after it those without a token
        count = max(self._examples + 1, starts.numel())
        ends = torch.full((count + 1 - starts.numel(),), self._length, dtype=starts.dtype)
        batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.cat([starts, ends])
        # how long examples may be, which a kernel divides its work by
        batch["max_length_q"] = batch["max_length_k"] = self._length
        return batch
