"""Safetensors headers, read strictly: the library's own files, and every lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from octavo.checkpoint.headers import DTYPE_BITS, read_header
from octavo.errors import CheckpointError
from tests.checkpoints import read_raw, truncate, write_raw

TENSORS = {
    "codes": torch.randn(5, 7).to(torch.float8_e4m3fn),
    "scales": torch.rand(5, 1).bfloat16(),
    "zero-dim": torch.tensor(3.0),
    "empty": torch.empty(0, 4),
    "bytes": torch.arange(9, dtype=torch.uint8),
    "exponents": torch.ones(3).to(torch.float8_e8m0fnu),
    "flags": torch.tensor([True, False]),
    "doubles": torch.randn(2, 2, 2).double(),
}
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def test_a_file_of_the_library(file):
    found = read_header(file)
    content = file.read_bytes()
    assert found.keys() == TENSORS.keys()
    with safe_open(file, "pt") as theirs:
        for key, entry in found.items():
            tensor = TENSORS[key]
            assert (entry.key, entry.file) == (key, file)
            assert entry.dtype == theirs.get_slice(key).get_dtype()
            assert entry.shape == tuple(tensor.shape)
            assert entry.nbytes == tensor.nbytes
            stored = content[entry.start : entry.end]
            assert (
                stored == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                if tensor.numel()
                else not stored
            )


def test_every_dtype_that_the_library_writes_is_known(tmp_path):
    from safetensors.torch import _SIZE, _TYPES

    # The library's own table of names and sizes.
    for name, dtype in _TYPES.items():
        assert DTYPE_BITS[name] == 8 * _SIZE[dtype], name


def test_half_byte_types(tmp_path):
    file = tmp_path / "model.safetensors"
    write_raw(file, {"x": {"dtype": "F4", "shape": [2, 3], "data_offsets": [0, 3]}}, b"abc")
    assert read_header(file)["x"].nbytes == 3


def test_no_tensors_and_trailing_spaces(tmp_path):
    file = tmp_path / "model.safetensors"
    write_raw(file, b'{"__metadata__": {"format": "pt"}}   ', b"")
    assert read_header(file) == {}


def test_order_in_the_header_is_free(tmp_path):
    file = tmp_path / "model.safetensors"
    write_raw(file, {"b": B, "a": A}, bytes(11))
    assert list(read_header(file)) == ["b", "a"]


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_cut_off(file, cut):
    truncate(file, cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.* is cut off.*accounts for \d+ bytes, the file has"):
        read_header(file)


@pytest.mark.parametrize("size", [0, 5, 8, 9, 40])
def test_cut_off_within_the_header(file, size):
    truncate(file, file.stat().st_size - size)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors has {size} bytes and says that .* header"):
        read_header(file)


def test_trailing_bytes(file):
    with file.open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(CheckpointError, match="bytes that belong to no tensor"):
        read_header(file)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63])
def test_a_length_that_cannot_be(file, length):
    header, data = read_raw(file)
    write_raw(file, header, data, length=length)
    with pytest.raises(CheckpointError, match="which cannot be"):
        read_header(file)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{not json", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", "JSON list, expected an object"),
        (b"[" * 100_000, "is not JSON"),
        (f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}'.encode(), "the key 'a' twice"),
        (
            b'{"a": {"dtype": "F32", "dtype": "U8", "shape": [2], "data_offsets": [0, 8], "data_offsets": [0, 2]}}',
            "twice",
        ),
    ],
    ids=["no-json", "no-utf8", "list", "deep", "key-twice", "field-twice"],
)
def test_a_header_that_is_no_header(tmp_path, text, words):
    file = tmp_path / "model.safetensors"
    write_raw(file, text, bytes(8))
    with pytest.raises(CheckpointError, match=words):
        read_header(file)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F99"}, "'a' has the dtype 'F99'"),
        ({"dtype": 4}, "'a' has the dtype 4"),
        ({"dtype": None}, "'a' has the dtype None"),
        ({"shape": [3]}, r"'a' is F32 of shape \[3\], 12 bytes.*gives it 8"),
        ({"dtype": "F16"}, r"'a' is F16 of shape \[2\], 4 bytes.*gives it 8"),
        ({"shape": [-2]}, "expected dtype, shape and data_offsets"),
        ({"shape": [2.0]}, "expected dtype, shape and data_offsets"),
        ({"shape": [True, 2]}, "expected dtype, shape and data_offsets"),
        ({"shape": 2}, "expected dtype, shape and data_offsets"),
        ({"shape": None}, "expected dtype, shape and data_offsets"),
        ({"data_offsets": [0]}, "expected dtype, shape and data_offsets"),
        ({"data_offsets": [0, 8, 9]}, "expected dtype, shape and data_offsets"),
        ({"data_offsets": ["0", "8"]}, "expected dtype, shape and data_offsets"),
        ({"data_offsets": [8, 0]}, "gives it -8"),
        ({"data_offsets": [-8, 0]}, "expected dtype, shape and data_offsets"),
        ({"data_offsets": [1, 9]}, "'a' begins at byte .* leaves a gap after the header"),
        ({"data_offsets": [4, 12]}, "leaves a gap|overlaps"),
        ({"data_offsets": [10**9, 10**9 + 8]}, "leaves a gap|overlaps"),
    ],
)
def test_an_entry_that_lies(tmp_path, change, words):
    file = tmp_path / "model.safetensors"
    write_raw(file, {"a": A | change, "b": B}, bytes(11))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(file)
    assert "model.safetensors" in str(caught.value)
    assert "download or write it again" in str(caught.value)


@pytest.mark.parametrize("fields", [None, 3, "F32", [], {}, {"dtype": "F32", "shape": [2]}])
def test_an_entry_that_is_no_entry(tmp_path, fields):
    file = tmp_path / "model.safetensors"
    write_raw(file, {"a": fields}, b"")
    with pytest.raises(CheckpointError, match=r"gives 'a' as .* expected dtype, shape and data_offsets"):
        read_header(file)


def test_two_tensors_on_the_same_bytes(tmp_path):
    file = tmp_path / "model.safetensors"
    write_raw(file, {"a": A, "c": A, "b": B}, bytes(11))
    with pytest.raises(CheckpointError, match=r"'c' begins at byte .* overlaps a"):
        read_header(file)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "model.safetensors")


def test_the_library_refuses_what_we_refuse(tmp_path):
    """We are strict where it is, so that an unquantized checkpoint that transformers loads is never refused here."""
    from safetensors import SafetensorError

    file = tmp_path / "model.safetensors"
    for header in ({"a": A}, {"a": A, "c": A, "b": B}, {"a": A | {"shape": [3]}, "b": B}):
        write_raw(file, header, bytes(11))
        with pytest.raises(SafetensorError), safe_open(file, "pt"):
            pass
        with pytest.raises(CheckpointError):
            read_header(file)
    file.write_bytes(struct.pack("<Q", 10**12) + b"{}")
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass
