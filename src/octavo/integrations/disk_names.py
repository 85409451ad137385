"""What a model's modules are called in the files of a checkpoint that is not there: for plans from a config alone."""

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming, rename_source_key


class DiskNames:
    """Names of a model's modules as a checkpoint has them, by transformers' own conversions in reverse.

    A checkpoint may leave out the base model's prefix or have one more; a config's rules are written for either.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._renamings = [
            entry.reverse_transform()
            for entry in reversed(conversions)
            if isinstance(entry, WeightRenaming) and not isinstance(entry, PrefixChange)
        ]

    def of(self, module: str) -> str:
        """The name on disk of a linear layer."""
        return str(rename_source_key(f"{module}.weight", self._renamings, [])[0]).removesuffix(".weight")

    def first_expert(self, stack: str) -> str | None:
        """The name on disk of the first matrix in the parameter ``stack``; None where the file itself has stacks,
        which are never FP8.
        """
        for converter in self._converters:
            # Some models escape the dots of their names.
            source = str(converter._original_source_patterns[0]).replace("\\.", ".")
            for target in converter.target_patterns:
                if stack.endswith(target) and "*" in source:
                    return self.of(f"{stack.removesuffix(target)}{source.replace('*', '0').removesuffix('.weight')}")
        return None
