"""``octavo.lora_config``: a peft configuration that reaches attention, dense and shared MLPs and routed experts.

peft turns ``gate_proj``, ``up_proj`` and ``down_proj`` of many MoE models into targets on the stacked experts and
drops the dense and shared layers of that name, in every form of ``target_modules``. Those layers are named as
*parameters* here, which peft leaves alone and stores under the same names and shapes.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from octavo.errors import AdapterError, CheckpointError, first_line
from octavo.integrations.targets import Group, Weight, bare_name, find_weights, shortest_endings

TARGETS: dict[str, Group] = {
    "attention": "attention",
    "mlp": "dense MLP",
    "shared_experts": "shared experts",
    "experts": "routed experts",
}
DEFAULT_TARGETS = tuple(TARGETS)

# Module names that peft rewrites into stacked experts wherever they stand.
_REWRITTEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
# What the configs call the number of experts that a token passes.
_TOP_K = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "num_experts_per_token", "moe_top_k")


def lora_config(
    model_or_path: nn.Module | str | Path,
    r: int = 16,
    *,
    alpha: float | None = None,
    expert_rank: int | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    router: bool = False,
    rslora: bool = False,
    dropout: float = 0.0,
    modules_to_save: Sequence[str] | None = None,
    trainable_token_indices: Sequence[int] | None = None,
    init: bool | str = True,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """A ``peft.LoraConfig`` for a model without an adapter, or for a checkpoint of which only ``config.json`` is read.

    ``r``: rank of attention, dense and shared layers. ``alpha``: numerator of the scaling ``alpha / r``; by default
    ``r``, so that the scaling is 1 in every group whatever the rank, and the learning rate alone sets the step (peft's
    own default is 8, and many recipes use 2r). ``expert_rank``: rank of routed experts, by default ``max(1, r //
    top_k)``: a token passes ``top_k`` experts, so it trains about as many factors there as in a dense MLP of rank
    ``r``. Their alpha follows, for the same scaling; with ``rslora`` (``alpha / sqrt(r)``) alpha is the same number in
    every group, since comparing ranks is what that scaling does.

    ``targets``: of ``attention``, ``mlp`` (dense layers), ``shared_experts``, ``experts`` (routed). By default all
    that the model has; a group that is asked for must exist. ``router``: train the routers too. ``dropout``: 0 unless
    every target is a linear layer of a model without experts, or attention: peft allows no other on parameters.
    ``modules_to_save``, ``trainable_token_indices``: trained in full, as in peft. ``init``: True (A uniform, B zero),
    "gaussian", or False (B random too).

    Raises :class:`AdapterError` for a group that is not there or a setting that peft cannot do on it, and
    :class:`CheckpointError` for a path that holds no config of a causal language model.
    """
    from peft import LoraConfig

    model = model_or_path if isinstance(model_or_path, nn.Module) else skeleton(model_or_path)
    chosen = _choose(find_weights(model), tuple(targets), router=router)
    modules, parameters = _names(model, chosen)
    if dropout and parameters:
        raise AdapterError(
            f"dropout={dropout} is impossible on {', '.join(parameters)}: peft adapts these as parameters, where only "
            "0 works. Use dropout=0, or targets=('attention',)."
        )
    if init not in (True, False, "gaussian"):
        raise AdapterError(
            f"init={init!r} does not work on FP8 weights, which it would read. Use True, False or 'gaussian'."
        )
    for name in modules_to_save or ():
        if not any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules()):
            raise AdapterError(f"modules_to_save names {name!r}, and no module of {type(model).__name__} ends in it.")
    _check_tokens(model, trainable_token_indices or ())
    alpha = r if alpha is None else alpha
    pattern = "|".join(re.escape(name) for name in parameters.get("experts", ()))
    rank = expert_rank or (max(1, r // _top_k(model)) if pattern else r)
    scaled = _whole(alpha if rslora else alpha * rank / r)
    return LoraConfig(
        r=r,
        lora_alpha=_whole(alpha),
        target_modules=modules,
        target_parameters=[name for names in parameters.values() for name in names] or None,
        rank_pattern={pattern: rank} if pattern and rank != r else {},
        alpha_pattern={pattern: scaled} if pattern and scaled != alpha else {},
        exclude_modules=None,
        use_rslora=rslora,
        lora_dropout=dropout,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        trainable_token_indices=list(trainable_token_indices) if trainable_token_indices else None,
        init_lora_weights=init,
        task_type=task_type,
    )


def _check_tokens(model: Any, indices: Sequence[int]) -> None:
    rows = len(model.get_input_embeddings().weight) if indices else 0
    if outside := [index for index in indices if not 0 <= index < rows]:
        raise AdapterError(
            f"trainable_token_indices names token {outside[0]}, and the model has embeddings of 0 to {rows - 1}."
        )


def expert_rank_note(model: nn.Module, config: Any) -> str | None:
    """Why routed experts have another rank than the rest, a sentence for beside a table; None where they have not."""
    ranks = {rank for pattern, rank in (config.rank_pattern or {}).items() if "experts" in pattern and rank != config.r}
    if len(ranks) != 1:
        return None
    (rank,), top_k = ranks, _top_k(model)
    return (
        f"routed experts have rank {rank} where other layers have {config.r}: a token passes {top_k} experts, "
        f"so it trains factors of {rank} x {top_k} = {rank * top_k} there"
    )


def skeleton(path_or_id: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint on the meta device, unquantized and without weights; reads ``config.json`` only.

    ``dtype``: of what the model's code gives none; the config's own unless given.
    """
    try:
        config = AutoConfig.from_pretrained(path_or_id)
    except OSError as error:
        raise CheckpointError(
            f"{str(path_or_id)!r} is neither a folder with a config.json nor a hub id that can be reached: {error}"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"transformers cannot read the config.json of {path_or_id}: {first_line(error)} Check model_type, "
            "and that transformers is new enough for this model."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{path_or_id} is a {config.model_type} model, which AutoModelForCausalLM of transformers does not build: "
            "it has no causal language model of that type."
        )
    make = AutoModelForCausalLM.from_config
    return _empty(make if dtype is None else partial(make, dtype=dtype), config)


def skeleton_of(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the class and config of ``model`` on the meta device, unquantized and without weights or adapters."""
    return _empty(type(model)._from_config, copy.deepcopy(model.config))


def _empty(make: Any, config: Any) -> PreTrainedModel:
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    with torch.device("meta"):
        model: PreTrainedModel = make(config)
    return model


def _choose(weights: Mapping[str, Weight], targets: tuple[str, ...], *, router: bool) -> dict[str, list[Weight]]:
    """The weights of each target that was asked for, by its name."""
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        raise AdapterError(
            f"targets names {unknown[0]!r}; choose of {', '.join(TARGETS)}, and router=True for the routers."
        )
    wanted: dict[str, Group] = {target: TARGETS[target] for target in targets}
    if router:
        wanted["router"] = "router"
    chosen = {
        target: [weight for weight in weights.values() if weight.group == group] for target, group in wanted.items()
    }
    # by default a group is taken where the model has it; what was asked for by name must exist
    optional = DEFAULT_TARGETS if targets == DEFAULT_TARGETS else ()
    missing = [target for target, found in chosen.items() if not found and target not in optional]
    if missing or not any(chosen.values()):
        what = ", ".join(missing or targets)
        raise AdapterError(f"targets: {what} matches nothing in this model. It has {_inventory(weights)}.")
    return {target: found for target, found in chosen.items() if found}


def _inventory(weights: Mapping[str, Weight]) -> str:
    """The groups of a model, by the name that ``targets`` has for them, with the layers in each."""
    names = {group: target for target, group in TARGETS.items()} | {"router": "router (router=True)"}
    lines = []
    for group, target in names.items():
        leaves = sorted({_leaf(weight) for weight in weights.values() if weight.group == group})
        if leaves:
            lines.append(f"{target}: {', '.join(leaves)}")
    return "; ".join(lines) or "no layer that LoRA could adapt"


def _leaf(weight: Weight) -> str:
    return weight.name.removesuffix(".weight").rpartition(".")[2]


def _names(model: nn.Module, chosen: Mapping[str, list[Weight]]) -> tuple[list[str], dict[str, list[str]]]:
    """The endings for ``target_modules``, and those for ``target_parameters`` by target."""
    every_module = [bare_name(name) for name, _ in model.named_modules()]
    every_parameter = [bare_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    is_moe = any(weight.group in ("routed experts", "router") for weight in find_weights(model).values())
    modules: list[str] = []
    parameters: dict[str, list[str]] = {}
    for target, weights in chosen.items():
        plain = [
            weight.module
            for weight in weights
            if weight.is_linear and not (is_moe and (target != "attention" or _leaf(weight) in _REWRITTEN))
        ]
        rest = [weight.name for weight in weights if weight.module not in plain]
        modules += shortest_endings(plain, every_module)
        if rest:
            # a stack by its owner and its own name; a weight by one more
            least = 2 if target == "experts" else 3
            parameters[target] = shortest_endings(rest, every_parameter, least=least)
    return modules, parameters


def _top_k(model: nn.Module) -> int:
    """How many experts a token passes."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    for name in _TOP_K:
        value = getattr(text, name, None)
        if value:
            return int(max(value) if isinstance(value, list | tuple) else value)
    raise AdapterError(
        f"{type(model).__name__} does not say how many experts a token passes (looked for {', '.join(_TOP_K)} in its "
        "config). Pass expert_rank."
    )


def _whole(value: float) -> float:
    """As an int where it is one: peft stores alpha in JSON as it gets it."""
    return int(value) if float(value).is_integer() else value
