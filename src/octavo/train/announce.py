"""Whether peft adapted what the configuration announced: it rewrites targets of mixture-of-experts models."""

from collections.abc import Collection
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper

from octavo.integrations.targets import bare_name
from octavo.train.trainable import trainable_tensors

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


def adapted_weights(model: PeftModel) -> set[str]:
    """The weights of the base model that have trainable LoRA factors, by their names there."""
    weights = set()
    for tensor in trainable_tensors(model):
        if tensor.side is not None:
            module = model.get_submodule(tensor.module)
            leaf = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            weights.add(f"{bare_name(tensor.module)}.{leaf}")
    return weights


def difference(announced: Collection[str], model: PeftModel) -> Difference:
    """Compare the weights that were announced, see `octavo.integrations.announced.rehearse`, with those that train."""
    adapted = adapted_weights(model)
    return Difference(tuple(sorted(set(announced) - adapted)), tuple(sorted(adapted - set(announced))))


def _some(names: Collection[str]) -> str:
    first = ", ".join(list(names)[:_NAMED])
    return first + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
