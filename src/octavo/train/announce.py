"""Whether peft adapted what the configuration announced: it rewrites targets of mixture-of-experts models."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from octavo.train.trainable import trainable_tensors

_PREFIX = "base_model.model."
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """Weights of the base model that a configuration names and peft left alone, and the other way round."""

    dropped: tuple[str, ...]
    added: tuple[str, ...]

    def lines(self) -> list[str]:
        """One sentence for each direction in which they differ."""
        said = (("dropped", self.dropped), ("added", self.added))
        return [f"peft {what} {len(names)} targets on its own: {_some(names)}" for what, names in said if names]


def announced_weights(base: PreTrainedModel, config: LoraConfig) -> set[str]:
    """The weights of ``base``, without an adapter yet, that ``config`` names by the rule it documents: a name is meant
    by itself and by its ending, a string is a regular expression over the whole name."""
    parameters = {name for name, _ in base.named_parameters()}
    modules = {name for name, module in base.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    if config.target_modules == "all-linear":
        head = base.get_output_embeddings()
        named = {
            name for name in modules if isinstance(module := base.get_submodule(name), nn.Linear) and module is not head
        }
    else:
        named = {name for name in modules if _meant(name, config.target_modules or ())}
    named -= {name for name in named if _meant(name, config.exclude_modules or ())}
    return {f"{name}.weight" for name in named} | {n for n in parameters if _meant(n, config.target_parameters or ())}


def adapted_weights(model: PeftModel) -> set[str]:
    """The weights of the base model that have trainable LoRA factors."""
    weights = set()
    for tensor in trainable_tensors(model):
        if tensor.side is not None:
            module = model.get_submodule(tensor.module)
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            name = tensor.module.removeprefix(_PREFIX)
            while name.endswith(".base_layer"):
                name = name.removesuffix(".base_layer")
            weights.add(f"{name}.{leaf}")
    return weights


def difference(announced: Collection[str], model: PeftModel) -> Difference:
    """Compare what was announced with what trains."""
    adapted = adapted_weights(model)
    return Difference(tuple(sorted(set(announced) - adapted)), tuple(sorted(adapted - set(announced))))


def _meant(name: str, targets: str | Collection[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:_NAMED])
    return first + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
