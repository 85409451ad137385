"""A checkpoint as a person names it, a folder or a hub id, to a folder on this machine."""

from __future__ import annotations

from pathlib import Path

from octavo.errors import CheckpointError


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of ``name``; of a hub id, its snapshot in the local cache. Nothing is downloaded.

    Raises: CheckpointError where there is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2:
        raise CheckpointError(f"{name} does not exist. Give the folder of a checkpoint, or a hub id as in org/model.")
    # Takes 0.3 s to import, and a folder does not need it.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        config = None
    if not isinstance(config, str):
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{name!r} is not a folder here, and the hub cache {HF_HUB_CACHE} has no snapshot of it{at}. "
            f"Check the path, or download it first: hf download {name}"
        )
    return Path(config).parent
