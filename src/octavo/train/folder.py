"""The folder of a run: what was asked, on what it ran, where it can go on, and what came out."""

import filecmp
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.trainer import TRAINER_STATE_NAME

import octavo
from octavo.errors import ConfigError
from octavo.train.config import RunConfig

_PACKAGES = (
    "octavo",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "triton",
)
_ADAPTER_FILE = "adapter_model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Files of a checkpoint that only resuming needs.
_STATES = ("optimizer", "scheduler", "scaler", "rng_state", "trainer_state", "training_args")


class RunFolder:
    """Paths and records of one run. Only the main process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.versions = path / "versions.json"
        self.metrics = path / "metrics.jsonl"
        self.completions = path / "completions.jsonl"
        self.adapter = path / "adapter"

    def require_folder(self) -> None:
        """Ask, before a model is loaded, that the folder can be there.

        Raises:
            ConfigError: something else is, or the folder above it cannot be written.
        """
        above = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not above.is_dir():
            raise ConfigError(f"`out`: {above} is a file, so {self.path} cannot be a folder. Choose another `out`.")
        if not os.access(above, os.W_OK):
            raise ConfigError(f"`out`: {above} cannot be written, so {self.path} cannot be. Choose another `out`.")

    def checkpoint(self, resume: str) -> Path | None:
        """The checkpoint to resume from under ``train.resume``, or None for a fresh start.

        Raises:
            ConfigError: a fresh start would mix with checkpoints that are there, or the named checkpoint is none.
        """
        if resume in ("auto", "never"):
            found = self._checkpoints()
            if found and resume == "never":
                raise ConfigError(
                    f"`train.resume` is `never`, but {self.path} holds checkpoints of an earlier run, last "
                    f"{found[-1].name}. Choose another `out`, or `train.resume: auto`."
                )
            return next(filter(is_whole, reversed(found)), None)
        path = Path(resume).expanduser().absolute()
        if not is_whole(path):
            raise ConfigError(
                f"`train.resume`: {path} is no checkpoint of a run; it has no whole trainer_state.json. Name a folder "
                f"such as {self.path / 'checkpoint-100'}, `auto` or `never`."
            )
        return path

    def cut_off(self) -> list[Path]:
        """Checkpoints that a run was writing when it was killed."""
        return [checkpoint for checkpoint in self._checkpoints() if not is_whole(checkpoint)]

    def _checkpoints(self) -> list[Path]:
        """By step, whole or not."""
        named = ((path, _CHECKPOINT.fullmatch(path.name)) for path in self.path.glob("checkpoint-*") if path.is_dir())
        return [path for _, path in sorted((int(match[1]), path) for path, match in named if match)]

    def finish(self, source: Path) -> Path:
        """The adapter of a run whose last checkpoint is ``source``: as it is in `adapter`, or written there from it.

        A run may have been killed before it wrote its adapter, and that of an earlier end may be there.
        """
        if not _same(source / _ADAPTER_FILE, self.adapter / _ADAPTER_FILE) or not is_adapter(self.adapter):
            self.adapter.mkdir(exist_ok=True)
            for file in source.iterdir():
                if file.is_file() and not file.name.startswith(_STATES):
                    shutil.copyfile(file, self.adapter / file.name)
        return self.adapter

    def changed_keys(self, config: RunConfig) -> list[str]:
        """Dotted keys in which ``config`` differs from the one this folder was started with."""
        if not self.config.is_file():
            return []
        before = _flat(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        after = _flat(yaml.safe_load(config.to_yaml()))
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        return sorted(changed - {"train.resume", "out"})

    def write_start(self, config: RunConfig, device: torch.device, world_size: int) -> None:
        """Write the resolved config and the versions."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config.write_text(config.to_yaml(), encoding="utf-8")
            self.versions.write_text(json.dumps(versions(device, world_size), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"The run folder {self.path} cannot be written: {error.strerror}.") from error


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the state of the trainer is the last file of it."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes()), dict)
    except (OSError, ValueError):
        return False


def is_adapter(path: Path) -> bool:
    """Whether ``path`` holds an adapter as peft writes it."""
    return (path / "adapter_config.json").is_file() and (path / _ADAPTER_FILE).is_file()


def versions(device: torch.device, world_size: int) -> dict[str, Any]:
    """Packages, interpreter, machine and, from a source tree, the commit of octavo."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "packages": {package: found for package in _PACKAGES if (found := _version(package))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type}: {name}",
        "processes": world_size,
        "cuda": torch.version.cuda,
        "octavo_commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree octavo was imported from; None for an installed package."""
    # A namespace is a list of folders; the package itself is one.
    source = Path(next(iter(octavo.__path__))).absolute()
    if not (source.parent.parent / ".git").exists():
        return None
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
