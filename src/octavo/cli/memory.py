"""How torch's GPU allocator is set up for a run, before torch is imported."""

import os

# Blocks that grow: rows of different length otherwise leave holes of several GB between them.
_SETTINGS = "expandable_segments:True"
# Under each of which a person may have said otherwise.
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def let_segments_grow() -> None:
    """Ask for an allocator that does not fragment, unless the environment asks for another."""
    if not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = _SETTINGS
