"""The small real models that ship with octavo, the data of the demo, and the demo itself."""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from octavo.errors import CheckpointError

_HERE = Path(str(files("octavo.demo")))


def checkpoint(name: str = "glm-tiny") -> Path:
    """The folder of a shipped model: ``glm-tiny`` (a scale per channel) and ``qwen-tiny`` (128×128 blocks) are mixtures
    of experts, ``dense-tiny`` (128×128 blocks) is not.

    Raises:
        CheckpointError: there is no model of that name.
    """
    folder = _HERE / "models" / name
    if not (folder / "config.json").is_file():
        known = sorted(path.parent.name for path in (_HERE / "models").glob("*/config.json"))
        raise CheckpointError(f"No model named {name!r} ships with octavo; there is {', '.join(known) or 'none'}.")
    return folder


def data(part: Literal["train", "eval"]) -> Path:
    """The jsonl file of word definitions as chats; no meaning in ``eval`` is in ``train``."""
    return _HERE / "data" / f"definitions-{part}.jsonl"
