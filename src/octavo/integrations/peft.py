"""peft on octavo's modules: adoption of stock wrappers at the moment peft puts them on a module.

:func:`install` registers one hook with torch. It looks at three attribute names that peft uses, acts only where the
module stored there is octavo's (or, for merging, a model that holds FP8 layers), and does nothing per forward.
"""

import sys

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from octavo.integrations.announced import check_targets, trainable_parameters
from octavo.integrations.lora_config import expert_rank_note, lora_config
from octavo.integrations.targets import find_weights, group_of

__all__ = [
    "check_targets",
    "expert_rank_note",
    "find_weights",
    "group_of",
    "install",
    "lora_config",
    "trainable_parameters",
]

# Where peft keeps a wrapped layer, the model of a tuner, and the module that modules_to_save copies.
_NAMES = ("base_layer", "model", "original_module")

_installed: list[RemovableHandle] = []


def install() -> None:
    """Adopt peft's wrappers over octavo's modules from now on, in this process; a second call does nothing."""
    if not _installed:
        _installed.append(register_module_module_registration_hook(_on_registration))


def _on_registration(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    # A wrapper exists only once peft has been imported, and importing it takes seconds that a mere load need not spend.
    if name in _NAMES and submodule is not None and "peft" in sys.modules:
        from octavo.integrations.adoption import on_registration

        on_registration(module, name, submodule)
