"""Which files make up a checkpoint: the config, the safetensors files, and what their index says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from octavo.errors import CheckpointError
from octavo.formats import modelopt
from octavo.formats.scheme import quantization_config

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A checkpoint's files. ``weight_map``: key to file name as the index has it, None for a checkpoint without one.

    ``strays``: shards beside the index that it does not list.
    """

    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None
    strays: tuple[Path, ...] = ()


def find(source: Path | Sequence[Path], config: Mapping[str, Any] | None = None) -> Source:
    """The files of a folder, or those given; a single ``model.safetensors`` wins over an index, as in transformers.

    Links are not followed: in the hub's cache each file of a snapshot is a link to a blob, and the folder is the
    snapshot's. ``config``: to be used in place of ``config.json``.

    Raises: CheckpointError where a file is absent, is not JSON, or lies outside the folder.
    """
    folder, given = _folder_and_files(source)
    if config is None:
        config = _read_config(folder)
    elif quantization_config(config) is None:
        config = _with_hf_quant_config(folder, config)
    if given is None:
        return _in_folder(folder, config)
    weight_map = _read_index(folder) if len(given) > 1 and (folder / INDEX).exists() else None
    if weight_map is not None and set(weight_map.values()) != {file.name for file in given}:
        # Another set of files than the index is about, a variant say.
        weight_map = None
    return Source(folder, config, given, weight_map)


def _folder_and_files(source: Path | Sequence[Path]) -> tuple[Path, tuple[Path, ...] | None]:
    if not isinstance(source, str | Path):
        files = tuple(Path(file) for file in source)
        if not files:
            raise CheckpointError("no files were given; a checkpoint has at least one safetensors file.")
        for file in files:
            if file.suffix != ".safetensors":
                raise CheckpointError(f"{file.name} is not a safetensors file. {_CONVERT}")
        return files[0].parent, files
    folder = Path(source)
    if folder.suffix == ".safetensors" and folder.is_file():
        return folder.parent, (folder,)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder. Give the folder that holds {CONFIG} and the safetensors files."
        )
    return folder, None


_CONVERT = "octavo reads safetensors only: save the model again with `save_pretrained`."


def _in_folder(folder: Path, config: Mapping[str, Any]) -> Source:
    if (folder / SINGLE).exists():
        return Source(folder, config, (folder / SINGLE,), None)
    if (folder / INDEX).exists():
        weight_map = _read_index(folder)
        names = sorted(set(weight_map.values()))
        for name in names:
            if not (folder / name).exists():
                raise CheckpointError(
                    f"{INDEX} lists {name!r}, which is not in {folder}. Download the missing file; "
                    f"{sum(1 for shard in weight_map.values() if shard == name)} tensors are in it."
                )
        strays = sorted(file for file in folder.glob("*.safetensors") if _SHARD.fullmatch(file.name))
        unlisted = tuple(file for file in strays if file.name not in names)
        return Source(folder, config, tuple(folder / name for name in names), weight_map, unlisted)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{folder} has {len(shards)} safetensors files, first {shards[0].name!r}, and neither {SINGLE} nor "
            f"{INDEX}. Download the index that belongs to them."
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(f"{folder} has its weights only as pickle files, first {pickles[0]!r}. {_CONVERT}")
    raise CheckpointError(f"{folder} has no weights: expected {SINGLE}, or {INDEX} with its shards.")


def _read_config(folder: Path) -> Mapping[str, Any]:
    if not (folder / CONFIG).exists():
        held = "is empty" if not any(folder.iterdir()) else f"has no {CONFIG}"
        raise CheckpointError(f"{folder} {held}: expected a checkpoint as transformers saves it, {CONFIG} included.")
    return _with_hf_quant_config(folder, _read_object(folder / CONFIG))


def _with_hf_quant_config(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config, with the settings that older ModelOpt exports keep beside it."""
    beside = folder / "hf_quant_config.json"
    if quantization_config(config) is not None or not beside.exists():
        return config
    return {**config, "quantization_config": modelopt.from_hf_quant_config(_read_object(beside))}


def _read_index(folder: Path) -> Mapping[str, str]:
    weight_map = _read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise CheckpointError(f"{INDEX} has no weight_map from tensor names to file names. Download it again.")
    for name in set(weight_map.values()):
        paths = PurePosixPath(name), PureWindowsPath(name)
        if any(path.is_absolute() or path.drive or ".." in path.parts for path in paths):
            raise CheckpointError(
                f"{INDEX} lists {name!r}, which lies outside {folder}. A checkpoint's shards are in its own folder."
            )
    return weight_map


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}). Download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is a JSON {type(found).__name__}, expected an object. Download it again.")
    return found
