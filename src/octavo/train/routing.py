"""How many tokens each expert got, counted where the router hands them over, without a device synchronisation."""

import inspect
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from octavo.integrations.experts import experts_layout
from octavo.integrations.taps import Observer

_WRAPPED = ".base_layer"


def experts_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The experts modules of ``model`` as (name, outermost wrapper, the model's own module).

    Adapters wrap the module, one wrapper per adapted parameter, and keep what they wrap under ``.base_layer``.
    """
    for name, module in model.named_modules():
        if experts_layout(module) is not None:
            outer = name
            while outer.endswith(_WRAPPED):
                outer = outer.removesuffix(_WRAPPED)
            yield outer, model.get_submodule(outer), module


def num_experts(own: nn.Module) -> int:
    """How many experts a module that `experts_layers` found holds on this rank."""
    return own.get_parameter("down_proj").shape[0]


class ExpertTokens:
    """Counts the tokens of training forwards, per experts layer and expert, until it is closed.

    What gradient checkpointing computes again in the backward pass is not counted again.
    """

    def __init__(self, model: nn.Module, *, padding: bool) -> None:
        """``padding``: count padded positions too. They are routed like any other but carry no loss."""
        self._padding = padding
        self._mask: torch.Tensor | None = None
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._on_model, with_kwargs=True)]
        self._tokens: torch.Tensor | None = None
        self._counts: dict[str, torch.Tensor] = {}
        for name, outer, own in experts_layers(model):
            position = list(inspect.signature(type(own).forward).parameters).index("top_k_index") - 1
            hook = _ExpertsHook(self, name, num_experts(own), position)
            self._handles.append(outer.register_forward_pre_hook(hook, with_kwargs=True))

    @property
    def counts(self) -> dict[str, torch.Tensor]:
        """Per experts layer, int64 [E]: (token, expert) pairs since the last reset, on this rank."""
        return {name: counts[:-1] for name, counts in self._counts.items()}

    @property
    def tokens(self) -> int:
        """Tokens without padding since the last reset, on this rank."""
        return 0 if self._tokens is None else int(self._tokens)

    def reset(self) -> None:
        """Start counting from zero."""
        if self._tokens is not None:
            self._tokens.zero_()
        for counts in self._counts.values():
            counts.zero_()

    def close(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _on_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        mask = kwargs.get("attention_mask")
        ids = args[0] if args else kwargs.get("input_ids")
        self._mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        given = torch.ones_like(ids, dtype=torch.bool) if self._mask is None and ids is not None else self._mask
        if given is None:
            return
        if self._tokens is None:
            self._tokens = torch.zeros((), dtype=torch.int64, device=given.device)
        self._tokens += given.sum()

    def count(self, layer: str, num_experts: int, chosen_TK: torch.Tensor) -> None:
        """Add the experts ``chosen_TK`` (integers, any leading shape) of one forward of ``layer``."""
        chosen_TK = chosen_TK.reshape(-1, chosen_TK.shape[-1])
        # Ids past the last expert mean "on another rank" under expert parallelism: counted in a slot that is cut off.
        slots = chosen_TK.clamp(max=num_experts).flatten().long()
        if layer not in self._counts:
            self._counts[layer] = torch.zeros(num_experts + 1, dtype=torch.int64, device=slots.device)
        weights = torch.ones_like(slots)
        if not self._padding and self._mask is not None and self._mask.numel() == len(chosen_TK):
            weights = self._mask.flatten().to(slots).repeat_interleave(chosen_TK.shape[-1])
        self._counts[layer].scatter_add_(0, slots, weights)


class _ExpertsHook(Observer):
    """Hands the chosen experts of one layer to the counter."""

    def __init__(self, counter: ExpertTokens, layer: str, num_experts: int, position: int) -> None:
        self._counter, self._layer, self._num_experts, self._position = counter, layer, num_experts, position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch._C._current_graph_task_id() == -1:
            chosen = kwargs["top_k_index"] if "top_k_index" in kwargs else args[self._position]
            self._counter.count(self._layer, self._num_experts, chosen.detach())
