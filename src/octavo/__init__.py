"""Fine-tune FP8 mixture-of-experts checkpoints as they are, with transformers, peft and trl.

The public names are loaded when they are first used, so ``import octavo`` costs nothing and patches nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from octavo.errors import AdapterError, CheckpointError, ConfigError, EngineError, OctavoError

if TYPE_CHECKING:
    from octavo import demo
    from octavo.integrations.compiled import compile_layers
    from octavo.integrations.generation import generate
    from octavo.integrations.graphs import graph_layers
    from octavo.integrations.lora_config import lora_config
    from octavo.integrations.transformers import configure, describe, enabled, load_model

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "OctavoError",
    "__version__",
    "compile_layers",
    "configure",
    "demo",
    "describe",
    "enabled",
    "generate",
    "graph_layers",
    "load_model",
    "lora_config",
]

_HOME = {
    "compile_layers": "octavo.integrations.compiled",
    "configure": "octavo.integrations.transformers",
    "describe": "octavo.integrations.transformers",
    "enabled": "octavo.integrations.transformers",
    "generate": "octavo.integrations.generation",
    "graph_layers": "octavo.integrations.graphs",
    "load_model": "octavo.integrations.transformers",
    "lora_config": "octavo.integrations.lora_config",
}


def __getattr__(name: str) -> object:
    if name == "demo":
        return import_module("octavo.demo")
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    # Python asks again only for names that the module lacks.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
