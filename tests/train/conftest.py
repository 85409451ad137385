"""The tiny model on disk, and data for it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeForCausalLM

from .tiny import byte_tokenizer, chat, tiny_config, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Products of 32 by 32 are ten times slower when threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model, float32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(tiny_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """24 chats in a jsonl file."""
    return write_jsonl(tmp_path / "chats.jsonl", [chat(index) for index in range(24)])
