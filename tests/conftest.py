"""Fixtures for every suite."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import Built, build

# trackio reads it once, when something first imports it; the default is in the home folder.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    """``built(arch=, layout=, ...)``: ``checkpoints.build`` with these arguments, once a session; not to be changed."""
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    known: dict[str, Built] = {}

    def get(**arguments: Any) -> Built:
        name = "-".join(f"{key}={value}" for key, value in sorted(arguments.items())).replace("/", "_")
        if name not in known:
            known[name] = build(folder / f"{len(known):03d}", **arguments)
        return known[name]

    return get
