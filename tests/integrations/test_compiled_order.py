"""What compiled layers compute for a batch does not depend on those before it: a resumed run has met others."""

import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

import octavo
from tests.integrations.test_compile_layers import graphs, step, tuned

# [rows, tokens]: as long as hidden states are wide, as many rows as tokens, one row, a mask
BATCHES = {"two": (2, 12), "short": (2, 9), "wide": (2, 256), "square": (9, 9), "one": (1, 9), "padded": (2, 16)}


def rounding(graph: torch.fx.GraphModule, inputs: Sequence[object]) -> Callable[..., list[Tensor]]:
    """A backend for which no two graphs round alike: each computes what it says, by a factor that comes of its text."""
    values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
    text = graph.code + str([value.shape for value in values if isinstance(value, Tensor)])
    factor = 1 + zlib.crc32(text.encode()) % 1000 / 1e6

    def run(*args: object) -> list[Tensor]:
        return [out * factor if out.is_floating_point() else out for out in graph(*args)]

    return run


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def steps(batches: Mapping[str, tuple[int, int]], *, norms: bool = False, **options: object) -> dict[str, Tensor]:
    """The losses and gradients of these batches, one after the other, on a model that has met none."""
    torch._dynamo.reset()
    model = tuned("qwen-tiny", layers=1)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or (norms and "norm" in key))
    octavo.compile_layers(model, **options)
    found = {}
    for name, (rows, length) in batches.items():
        mask = (torch.arange(length) < length - 3).expand(rows, -1) if name == "padded" else None
        tensors = step(model, length, rows, attention_mask=mask)
        found |= {f"{name}: {key}": value for key, value in tensors.items()}
    return found


def assert_order_is_nothing(batches: Mapping[str, tuple[int, int]], **options: object) -> None:
    forth = steps(batches, **options)
    back = steps(dict(list(batches.items())[::-1]), **options)
    assert forth.keys() == back.keys()
    assert [key for key, value in forth.items() if not torch.equal(value, back[key])] == []


@pytest.mark.parametrize(("shape", "count"), [(None, 3), ((2, 12), 4)], ids=str)
def test_a_batch_takes_one_graph_in_any_order(shape, count):
    assert_order_is_nothing(BATCHES, backend=rounding, shape=shape)
    # one row or several, with a mask or without, and the shape that was asked for; twice, since there were two models
    assert graphs() == 2 * count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++ and needs a compiler for it")
@pytest.mark.parametrize("shape", [None, (2, 300)], ids=str)
def test_inductor_rounds_a_batch_alike_in_any_order(shape):
    """With the gradients of norms, sums over all tokens: two threads share them out otherwise if the code does not say
    how many there are.
    """
    torch.set_num_threads(2)
    assert_order_is_nothing({"long": (2, 300), "short": (2, 211)}, norms=True, shape=shape)
