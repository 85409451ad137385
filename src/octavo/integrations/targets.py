"""What of a model can carry LoRA, by group, read off the model's structure rather than a list of names.

A weight is called by its name in the bare model: ``model.layers.3.mlp.experts.down_proj``, whatever peft wrapped
around it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from octavo.integrations.experts import experts_layout

Group = Literal["attention", "dense MLP", "shared experts", "routed experts", "router", "embeddings", "other"]
GROUPS: tuple[Group, ...] = (
    "attention",
    "dense MLP",
    "shared experts",
    "routed experts",
    "router",
    "embeddings",
    "other",
)

# What peft keeps beside a wrapped module, to the end of the name.
_PEFT_PARTS = re.compile(r"\.(lora_\w+|ia3_l|hada_\w+|lokr_\w+|modules_to_save|original_module|token_adapter)(\..*)?$")

# Read in the name and the class of the modules around a linear layer.
_ATTENTION = re.compile(r"attn|attention|deltanet", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
# An indexer picks positions, and its choice has no gradient; the others steer a norm or the residual stream.
_ASIDE = re.compile(r"indexer|norm|hyper_?connection", re.IGNORECASE)


@dataclass(frozen=True)
class Weight:
    """A matrix or a stack of matrices. ``is_linear``: it is the weight of an ``nn.Linear``."""

    name: str
    group: Group
    is_linear: bool

    @property
    def module(self) -> str:
        """The module that holds it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class _Expert:
    """A stacked-experts module: its name, that of the block around it, and how many experts it has."""

    name: str
    block: str
    num_experts: int


def find_weights(model: nn.Module) -> dict[str, Weight]:
    """Every weight of ``model`` that LoRA could adapt, by name: of linear layers, stacks of experts and routers.

    Works on the meta device, with octavo's modules or without, and inside the wrappers of peft, DDP and compile.
    """
    base = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)
    modules = {bare_name(name): module for name, module in base.named_modules() if not _inside_adapter(name)}
    decoder = _decoder_prefix(base)
    experts = [
        _Expert(name, name.rpartition(".")[0], module.get_parameter("down_proj").shape[0])
        for name, module in modules.items()
        if experts_layout(module) is not None
    ]
    found: dict[str, Weight] = {}
    for name, module in modules.items():
        layout = experts_layout(module)
        if layout is not None:
            for stack in layout.names:
                found[f"{name}.{stack}"] = Weight(f"{name}.{stack}", "routed experts", False)
        elif isinstance(module, nn.Linear):
            group = _group(name, module.out_features, modules, experts) if name.startswith(decoder) else "other"
            found[f"{name}.weight"] = Weight(f"{name}.weight", _embedding(base, module) or group, True)
        elif any(_parent(name) == expert.block for expert in experts):
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding):
                found[f"{name}.weight"] = Weight(f"{name}.weight", "router", False)
    return found


def group_of(parameter: str, weights: Mapping[str, Weight]) -> Group:
    """The group of any parameter of a model, adapters included, given the model's :func:`find_weights`."""
    name = bare_name(parameter)
    owner = _PEFT_PARTS.sub("", name)
    for known in (name, owner, f"{owner}.weight"):
        if known in weights:
            return weights[known].group
    # A factor of a stack lies on the experts module itself; a bias beside its weight.
    beside = [weight for weight in weights.values() if weight.module in (owner, _parent(owner))]
    if beside:
        return beside[0].group
    return "embeddings" if re.search(r"embed|lm_head", name) else "other"


def bare_name(name: str) -> str:
    """A module's or parameter's name without what peft, DDP and compile put around the model and its layers."""
    name = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def shortest_endings(wanted: Iterable[str], everything: Iterable[str], *, least: int = 1) -> list[str]:
    """The endings, at dots, that name all of ``wanted`` and nothing else of ``everything``.

    The shortest of at least ``least`` parts. peft matches a target by equality or by such an ending.
    """
    wanted = set(wanted)
    reversed_others = [name.split(".")[::-1] for name in everything if name not in wanted]
    endings: set[str] = set()
    for name in wanted:
        parts = name.split(".")
        # how many last parts the name shares with any name that is not wanted; one more tells them apart
        shared = max((_common(parts[::-1], other) for other in reversed_others), default=0)
        endings.add(".".join(parts[-max(least, shared + 1) :]))
    return sorted(endings)


def _common(first: list[str], second: list[str]) -> int:
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def _group(name: str, rows: int, modules: Mapping[str, nn.Module], experts: list[_Expert]) -> Group:
    """The group of a linear layer of the decoder."""
    ancestors = [name[: match.start()] for match in re.finditer(r"\.", name)]
    around = [
        f"{ancestor.rpartition('.')[2]} {type(modules[ancestor]).__name__}"
        for ancestor in ancestors
        if ancestor in modules
    ]
    if any(_ASIDE.search(kind) for kind in around):
        return "other"
    own = next((expert for expert in experts if name.startswith(f"{expert.block}.")), None)
    if own is not None:
        rest = name.removeprefix(f"{own.block}.")
        if name.startswith(f"{own.name}."):
            return "routed experts"
        if rows in (own.num_experts, 1) or rest.startswith(("gate.", "router.")):
            return "router"
    if around[-1:] and around[-1].startswith("shared"):
        return "shared experts"
    if any(_ATTENTION.search(kind) for kind in around):
        return "attention"
    return "dense MLP" if any(_MLP.search(kind) for kind in around) else "other"


def _embedding(model: nn.Module, module: nn.Module) -> Group | None:
    if not isinstance(model, PreTrainedModel):
        return None
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return "embeddings" if any(module is end for end in ends) else None


def _decoder_prefix(model: nn.Module) -> str:
    """The beginning of the names of the text decoder's modules; nothing where the model is one."""
    if not isinstance(model, PreTrainedModel):
        return ""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{bare_name(name)}." if name else ""


def _inside_adapter(name: str) -> bool:
    return _PEFT_PARTS.search(name) is not None


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
