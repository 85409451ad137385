"""Every experts class of the installed transformers, by a walk through its model modules: a new version's classes
turn up by themselves.
"""

import importlib
import inspect
import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import transformers.models
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

DECORATOR = "use_experts_implementation"
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# decorators and the class line, then the body
_CLASSES = re.compile(r"((?:^@.*\n)*^class \w+.*\n)((?:^[ \t].*\n|^\n|^\).*\n)*)", re.MULTILINE)
_STACKS = re.compile(r"self\.(gate_)?up_proj = nn\.Parameter\(")


@cache
def _modeling_modules(pattern: str) -> list[ModuleType]:
    """The modeling modules whose source matches ``pattern``; the others are never imported."""
    files = sorted(Path(transformers.models.__path__[0]).glob("*/modeling_*.py"))
    names = [
        f"{transformers.models.__name__}.{f.parent.name}.{f.stem}"
        for f in files
        if re.search(pattern, f.read_text("utf-8"))
    ]
    return [importlib.import_module(name) for name in names]


def _own_classes(module: ModuleType) -> list[type[nn.Module]]:
    members = vars(module).values()
    return [m for m in members if inspect.isclass(m) and issubclass(m, nn.Module) and m.__module__ == module.__name__]


def _is_decorated(cls: type[nn.Module]) -> bool:
    """Whether the class's forward is the one that the decorator made; on a class it leaves no other mark."""
    forward = cls.forward
    return inspect.isfunction(forward) and forward.__code__.co_qualname.startswith(f"{DECORATOR}.")


@cache
def experts_classes() -> dict[str, type[nn.Module]]:
    """Class name to class, of every class with the decorator."""
    found = [cls for module in _modeling_modules(DECORATOR) for cls in _own_classes(module) if _is_decorated(cls)]
    by_name = {cls.__name__: cls for cls in found}
    assert len(by_name) == len(found), "two experts classes share a name"
    return by_name


@cache
def undecorated_classes() -> frozenset[str]:
    """Names of the classes that hold stacks by the usual names and lack the decorator. Read off the sources; nothing
    is imported.
    """
    found = set()
    for file in Path(transformers.models.__path__[0]).glob("*/modeling_*.py"):
        for head, body in _CLASSES.findall(file.read_text("utf-8")):
            if _STACKS.search(body) and DECORATOR not in head:
                found.add(re.search(r"^class (\w+)", head, re.MULTILINE)[1])
    return frozenset(found)


def config_class(experts: type[nn.Module]) -> type[PreTrainedConfig]:
    """The config that an experts class reads: one that its module imports and that counts experts, the one named
    most like it.
    """
    imported = [
        m for m in vars(inspect.getmodule(experts)).values() if inspect.isclass(m) and issubclass(m, PreTrainedConfig)
    ]
    counting = [config for config in imported if set(COUNTS) & set(config.__dataclass_fields__)]

    def likeness(config: type[PreTrainedConfig]) -> tuple[int, int]:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(experts.__name__, config.__name__, strict=False))
        return len(list(same)), -len(config.__name__)

    return max(counting, key=likeness)


def causal_lm_class(experts: type[nn.Module]) -> type[PreTrainedModel] | None:
    """What ``AutoModelForCausalLM`` builds from that config, ``None`` where it builds nothing."""
    config = config_class(experts)
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(config, None)
