"""Products for Hopper by themselves, with tiles of another size than the engine chose."""

import torch

from benchmarks.hopper import with_tokens
from octavo.ops.hopper.product import GateGradient


def test_smaller_tiles_have_room_for_their_sums():
    rows, experts, features = 300, 4, 8
    # as many tiles as there can be: each expert but one has a single row
    counts = [rows - experts + 1, *[1] * (experts - 1)]

    def tiles(tokens: int) -> int:
        return sum(-(-count // tokens) for count in counts)

    sums = torch.empty(-(-rows // 160) + experts, features, 16)
    z = torch.empty(0)
    for tokens in (64, 128, 192):
        options = {"tokens": 160, "gradient": GateGradient(z, z, z, sums), "h": None}
        found = with_tokens(options, tokens)
        assert found["tokens"] == tokens
        assert found["gradient"].sums.shape[0] >= tiles(tokens)
        assert found["gradient"].sums.shape[1:] == sums.shape[1:]
    assert with_tokens(options, None) is options
    assert with_tokens(options | {"gradient": None}, 64)["tokens"] == 64
