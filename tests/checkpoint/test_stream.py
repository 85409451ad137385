"""Reading tensors in file order: bytes and places, whatever the pieces; damage, and leaving early."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.checkpoint import stream
from octavo.checkpoint.headers import TensorEntry, read_header
from octavo.checkpoint.stream import Buffers, Stream
from octavo.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 0x7F, (40, 33), dtype=torch.uint8, generator=generator)
    return {
        "codes": codes.view(torch.float8_e4m3fn),
        "wide": torch.randn(17, 5, generator=generator),
        "narrow": torch.randn(3, 2, 7, generator=generator).bfloat16(),
        "one": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "integers": torch.arange(9),
        "truth": torch.tensor([True, False, True]),
    }


@pytest.fixture
def entries(tensors: dict[str, Tensor], tmp_path: Path) -> list[TensorEntry]:
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    found: list[TensorEntry] = []
    for index, half in enumerate(halves):
        save_file(half, tmp_path / f"{index}.safetensors")
        found += read_header(tmp_path / f"{index}.safetensors").values()
    return found


def same(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("buffers", [None, Buffers], ids=["straight", "buffered"])
@pytest.mark.parametrize("piece_bytes", [1, 64, 1 << 20])
def test_every_byte_arrives(
    tensors: dict[str, Tensor],
    entries: list[TensorEntry],
    piece_bytes: int,
    buffers: type[Buffers] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "_VECTORS", 2)
    if buffers is not None:
        # A place of the CPU would be read into directly.
        monkeypatch.setattr(stream, "_is_on_host", lambda place: False)
    with Stream(entries, CPU, piece_bytes=piece_bytes, num_threads=3, buffers=buffers) as source:
        # The last in the files first: taking has no order.
        found = {key: source.take(key) for key in reversed(tensors)}
    assert all(same(found[key], tensor) for key, tensor in tensors.items())


def test_places_are_filled_and_the_rest_is_left_alone(tensors: dict[str, Tensor], entries: list[TensorEntry]) -> None:
    stack = torch.full((2, 40, 33), 0.5).to(torch.float8_e4m3fn)
    with Stream(entries, CPU, {"codes": stack[1]}, piece_bytes=100) as source:
        taken = source.take("codes")
    assert taken.data_ptr() == stack[1].data_ptr()
    assert same(stack[1], tensors["codes"])
    assert (stack[0].float() == 0.5).all()


def test_only_what_is_asked_for_is_read(entries: list[TensorEntry], tmp_path: Path) -> None:
    wanted = [entry for entry in entries if entry.key != "codes"]
    pieces = list(stream._pieces(wanted, 1 << 20))
    covered = sum(piece.nbytes for piece in pieces)
    assert covered == sum(entry.nbytes for entry in wanted)
    assert all(piece.nbytes == sum(s.end - s.start for s in piece.segments) for piece in pieces)


def test_pieces_go_through_each_file_once(entries: list[TensorEntry]) -> None:
    pieces = list(stream._pieces(reversed(entries), 50))
    for file in {entry.file for entry in entries}:
        starts = [piece.start for piece in pieces if piece.file == file]
        assert starts == sorted(starts)
    order = [piece.file for piece in pieces]
    assert order == sorted(order, key=order.index)


def test_a_file_that_became_shorter_is_named(entries: list[TensorEntry]) -> None:
    file = entries[0].file
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    last = max((entry for entry in entries if entry.file == file), key=lambda entry: entry.end)
    with Stream(entries, CPU) as source, pytest.raises(CheckpointError, match=f"{file.name} ends at byte"):
        source.take(last.key)


def test_a_file_that_is_gone_is_named(entries: list[TensorEntry]) -> None:
    entries[0].file.unlink()
    with Stream(entries, CPU) as source, pytest.raises(CheckpointError, match=r"0\.safetensors cannot be read"):
        source.take(entries[0].key)


def test_leaving_early_stops_the_reading(entries: list[TensorEntry]) -> None:
    with Stream(entries, CPU, piece_bytes=1, num_threads=1) as source:
        source.take(entries[0].key)
    assert source._next_piece() is None
