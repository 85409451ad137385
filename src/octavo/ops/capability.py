"""What can run on a device, and why not: the table in ``capability.toml``. Nothing is found out by running it."""

import importlib.util
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import torch

Runs = Literal["yes", "untested", "no"]


@dataclass(frozen=True)
class Ability:
    """Whether something runs on an architecture: ``auto`` picks ``yes`` only, ``untested`` runs by name."""

    runs: Runs
    why: str = ""


@dataclass(frozen=True)
class Architecture:
    """A row of the table. ``torch``: plain torch code. ``kernels``: octavo's own. ``scaled_mm``: torch's rowwise FP8
    product.
    """

    name: str
    title: str
    torch: Ability
    kernels: Ability
    scaled_mm: Ability


@cache
def architectures() -> dict[str, Architecture]:
    """The table, by name."""
    table = tomllib.loads(files("octavo.ops").joinpath("capability.toml").read_text(encoding="utf-8"))
    return {
        name: Architecture(name, row["title"], *(Ability(**row[what]) for what in ("torch", "kernels", "scaled_mm")))
        for name, row in table.items()
    }


@cache
def architecture_of(device: torch.device) -> Architecture:
    """The row for ``device``, from its properties: no kernel runs and the device is not synchronised."""
    return architectures()[_row(device)]


def _row(device: torch.device) -> str:
    if device.type in ("cpu", "meta"):
        return "cpu"
    if device.type != "cuda":
        return "other"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0]
        return name if name in architectures() else "other"
    return nvidia_row(properties.major, properties.minor)


def nvidia_row(major: int, minor: int) -> str:
    """The table's name for a compute capability."""
    if (major, minor) == (8, 9):
        return "sm89"
    return {8: "sm80", 9: "sm90", 10: "sm100", 12: "sm120"}.get(major, "other")


@cache
def triton_missing() -> str | None:
    """Why Triton kernels cannot be used in this process, or ``None``."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"
